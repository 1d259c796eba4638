"""torch.distributed.checkpoint: save, load into everything anew, continue as if nothing was."""

import io
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from prodigyopt import Prodigy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import oplora

WORLD, STEPS = 2, 6
FORMS = {
    "exact": dict(),
    "lite": dict(lite=True),
    "any": dict(optimizer_cls=torch.optim.NAdam),
    "momentum": dict(optimizer_cls=torch.optim.SGD, momentum=0.9),
    "stateless": dict(optimizer_cls=torch.optim.SGD),
    "prodigy": dict(optimizer_cls=Prodigy),  # its groups have state, too
    "whole": dict(optimizer_cls=torch.optim.Adafactor),  # moments of a matrix' rows and columns
}
WAYS = {
    "sharded": dict(),
    "flat": dict(flatten_optimizer_state_dict=True),
    "full": dict(full_state_dict=True),
    "offloaded": dict(full_state_dict=True, cpu_offload=True),
}


def build(form, sharded=False, **options):
    """DoRA on two layers, with parameters that are trained directly."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5), nn.Linear(5, 3))
    config = LoraConfig(
        r=1 if sharded else 3,  # with 1, one process holds no value of A
        target_modules=["0", "2"],
        use_dora=True,
        bias="all",
        modules_to_save=["3"],
    )
    net = get_peft_model(layers, config)
    if sharded:
        for layer in net.base_model.model:
            if next(layer.parameters(), None) is not None:
                fully_shard(layer)
        fully_shard(net)
    options = dict(lr=0.1, mlp_width=16, z_dim=8, edited="raise", **FORMS[form], **options)
    if form == "lite":
        del options["lite"]
        return net, oplora.peft.create_oplora_lite_optimizer(net, **options)
    return net, oplora.create_oplora_optimizer(net, **options)


def train(net, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        (net(torch.randn(4, 7, generator=generator)) - 1).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def values(net):
    pairs = net.named_parameters()
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in pairs}


def kept_rows(optimizer):
    return [count for stack in optimizer.stacks for count in stack.rows.active]


def through_dcp(folder, saved, resumed, options):
    """As torch's guide: what the new ones hold is loaded over, and set."""
    options = StateDictOptions(**options)

    def state(net, optimizer):
        return {
            "model": get_model_state_dict(net, options=options),
            "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
        }

    dcp.save(state(*saved), checkpoint_id=folder)
    found = state(*resumed)
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(resumed[0], found["model"], options=options)
    set_optimizer_state_dict(*resumed, found["optimizer"], options=options)


def through_a_file(folder, saved, resumed, options):
    """The whole state as one file of rank 0, which `torch.load` reads safely, for all ranks."""
    get, broadcast = StateDictOptions(**options), dist.is_initialized()
    state = get_model_state_dict(saved[0], options=get), get_optimizer_state_dict(*saved, options=get)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    model, optimizer = torch.load(file, weights_only=True)
    to_set = StateDictOptions(**options, broadcast_from_rank0=broadcast)
    set_model_state_dict(resumed[0], model, options=to_set)
    set_optimizer_state_dict(*resumed, optimizer, options=to_set)


def interrupted(form, way, folder, saved_at=STEPS, sharded=False):
    """Parameters of an uninterrupted training, and of one that is saved and resumed."""
    whole = build(form, sharded)
    train(*whole, 0, 2 * STEPS)
    saved, resumed = build(form, sharded), build(form, sharded)
    train(*saved, 0, saved_at)
    before = kept_rows(resumed[1])
    (through_a_file if "full" in str(WAYS[way]) else through_dcp)(
        str(folder), saved, resumed, WAYS[way]
    )
    if form == "exact" and saved_at:
        assert kept_rows(resumed[1]) != before  # the shapes of W2 differ without the layout
    train(*resumed, saved_at, 2 * STEPS)
    return values(whole[0]), values(resumed[0])


@pytest.mark.parametrize("saved_at", [0, STEPS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_resume_is_bit_identical(way, form, saved_at, tmp_path):
    whole, resumed = interrupted(form, way, tmp_path, saved_at)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def worker(process, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=process, world_size=WORLD)
    torch.set_num_threads(1)
    results = {
        case: interrupted(*case, f"{folder}/{'-'.join(map(str, case))}", sharded=True)
        for case in SHARDED
    }
    torch.save(results, f"{folder}/{process}.pt")
    dist.destroy_process_group()


SHARDED = [(form, way) for form in ("exact", "lite", "any") for way in WAYS]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sharded"))
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=WORLD)
    return [torch.load(f"{folder}/{process}.pt", weights_only=True) for process in range(WORLD)]


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_under_fsdp2_too(case, sharded):
    for process in sharded:
        whole, resumed = process[case]
        for name, value in whole.items():
            assert torch.equal(resumed[name], value), name
