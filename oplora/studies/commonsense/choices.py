"""Log-probabilities of several continuations of one prompt, the prompt computed once.

Questions are packed one after another into a single row. A question is a tree in it: the tokens
that its choices share, then one branch per choice. Position ids count along a branch, and the
mask lets a token see its own branch and the shared tokens only, so that every branch is computed
exactly as if it stood alone in a row, without padding and without repeating the prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Branch(NamedTuple):
    """Token ids of prompt and choice, and the index of the first token that is scored."""

    ids: list[int]
    start: int


class Tree(NamedTuple):
    """One question: its branches and how many first tokens they share."""

    branches: list[Branch]
    shared: int

    @property
    def tokens(self) -> int:
        return self.shared + sum(len(branch.ids) - self.shared for branch in self.branches)


class Row(NamedTuple):
    """Packed trees of T tokens of which S are scored."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,)
    visible: Tensor  # (T, T) bool, [i, j]: token i sees token j
    sources: Tensor  # (S,) where the distribution of a scored token is read
    targets: Tensor  # (S,) the scored tokens, tree by tree, branch by branch
    counts: list[list[int]]  # scored tokens of every branch of every tree


def question_tree(tokenizer: PreTrainedTokenizerBase, prompt: str, choices: Sequence[str]) -> Tree:
    """The tree of `prompt + choice` for all choices.

    Scored are the tokens with characters of the choice: prompt and choice are tokenised together,
    so a token may hold the end of one and the start of the other.
    """
    encoded = tokenizer([prompt + choice for choice in choices], return_offsets_mapping=True)
    branches = []
    for choice, ids, offsets in zip(
        choices, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        start = next((n for n, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        if not 0 < start < len(ids):
            raise ValueError(f"nothing to score in choice {choice!r} after prompt {prompt!r}")
        branches.append(Branch(ids, start))
    return Tree(branches, _shared_tokens(branches))


def pack(trees: Sequence[Tree]) -> Row:
    """All trees in one row."""
    ids, positions, tree_of, branch_of, sources, targets, counts = [], [], [], [], [], [], []
    for number, (branches, shared) in enumerate(trees):
        root = len(ids)
        ids += branches[0].ids[:shared]
        positions += range(shared)
        branch_of += [-1] * shared
        for k, branch in enumerate(branches):
            offset = len(ids) - shared  # of the branch's own tokens in the row
            before = range(branch.start - 1, len(branch.ids) - 1)
            sources += [n + (root if n < shared else offset) for n in before]
            targets += branch.ids[branch.start :]
            ids += branch.ids[shared:]
            positions += range(shared, len(branch.ids))
            branch_of += [k] * (len(branch.ids) - shared)
        tree_of += [number] * (len(ids) - root)
        counts.append([len(branch.ids) - branch.start for branch in branches])
    tree, branch = torch.tensor(tree_of), torch.tensor(branch_of)
    same_tree = tree[:, None] == tree
    on_path = (branch == -1) | (branch[:, None] == branch)
    visible = (same_tree & on_path).tril()
    tensors = (torch.tensor(values) for values in (ids, positions))
    return Row(*tensors, visible, torch.tensor(sources), torch.tensor(targets), counts)


@torch.inference_mode()
def row_logprobs(model: PreTrainedModel, row: Row) -> list[list[Tensor]]:
    """Log-probability of every scored token, fp32, for every choice of every tree.

    Needs a causal model with `logits_to_keep` whose attention takes a 4-D mask ("sdpa" or
    "eager").
    """
    device = model.device
    hidden = torch.finfo(model.dtype).min
    mask = torch.zeros(row.visible.shape, dtype=model.dtype).masked_fill(~row.visible, hidden)
    read, which = torch.unique(row.sources, return_inverse=True)  # branches share their root
    logits = model(
        input_ids=row.input_ids[None].to(device),
        position_ids=row.position_ids[None].to(device),
        attention_mask=mask[None, None].to(device),
        logits_to_keep=read.to(device),
        use_cache=False,
    ).logits[0]
    every = logits.float().log_softmax(-1).cpu()
    scored = every[which, row.targets]
    return [
        list(scores.split(counts))
        for scores, counts in zip(
            scored.split([sum(counts) for counts in row.counts]), row.counts, strict=True
        )
    ]


def in_rows(trees: Iterable[Tree], tokens_per_row: int) -> Iterator[list[Tree]]:
    """Consecutive trees in groups of at most `tokens_per_row` tokens (or of one larger tree)."""
    group, used = [], 0
    for tree in trees:
        if group and used + tree.tokens > tokens_per_row:
            yield group
            group, used = [], 0
        group.append(tree)
        used += tree.tokens
    if group:
        yield group


def _shared_tokens(branches: Sequence[Branch]) -> int:
    """Length of the common start of all branches, within what is not scored."""
    limit = min(branch.start for branch in branches)
    columns = zip(*(branch.ids[:limit] for branch in branches), strict=True)
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), limit)
