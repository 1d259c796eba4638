"""Two processes equal one: DDP, FSDP2, and FSDP2 as accelerate prepares it."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import oplora
from oplora.diagnostics import diagnose

WORLD, STEPS, MICRO = 2, 20, 2
RANKS = (3, 1)  # of LoRA: with 1, one process holds no value of A
CASES = list(itertools.product(("ddp", "fsdp2", "prepared"), RANKS, (None, "mlp")))
CASES += itertools.product(("ddp", "fsdp2"), RANKS, ("scale",))  # no MLP, but a learned scale


def model(rank):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5), nn.Linear(5, 3))
    config = LoraConfig(
        r=rank, target_modules=["0", "2"], use_dora=True, bias="all", modules_to_save=["3"]
    )
    return get_peft_model(layers.double(), config)


def shard(net):
    for layer in net.base_model.model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer)
    fully_shard(net)


def prepare(wrap, net, clip):
    """The network to call and its optimizer."""
    options = dict(lr=1e-2, weight_decay=0.1, mlp_width=8, clip=clip, max_norm=0.05)
    if wrap == "ddp":
        net = DistributedDataParallel(net)
    if wrap == "fsdp2":
        shard(net)
    if clip == "scale":
        return net, oplora.create_scale_optimizer(net, lr=1e-3, weight_decay=0.1)
    if wrap != "prepared":
        return net, oplora.create_oplora_optimizer(net, **options)
    optimizer = oplora.create_oplora_optimizer(net, **options)
    optimizer.load_state_dict(optimizer.state_dict())
    names = {id(p): name for name, p in net.named_parameters()}
    shard(net)
    sharded = dict(net.named_parameters())
    for group in optimizer.param_groups:  # as accelerate's fsdp2_switch_optimizer_parameters
        group["params"] = [sharded[names[id(p)]] for p in group["params"]]
    return net, optimizer


def run(wrap, lora_rank, clip, process=None):
    """All parameters after training; the same 8 rows a step however many processes share them.

    And the diagnosis before the last step.
    """
    net = model(lora_rank)
    call, optimizer = prepare(wrap, net, clip)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(MICRO, 4, 7, generator=generator, dtype=torch.float64)
        for part in x if process is None else x[:, process::WORLD]:
            (call(part).square().mean() / MICRO).backward()
        told = [list(block.values())[1:] for block in diagnose(optimizer)]
        optimizer.step()
    if wrap in ("fsdp2", "prepared"):
        assert all(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"])
        stacks = getattr(optimizer, "stacks", [])  # the scale has none
        assert all(isinstance(t, DTensor) for stack in stacks for t in stack.tensors.flat)
    values = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in net.named_parameters()
    }
    return values | {"diagnosis": torch.tensor(told, dtype=torch.float64)}


def worker(process, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1")
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=process, world_size=WORLD)
    torch.set_num_threads(1)
    results = {case: run(*case, process=process) for case in CASES}
    torch.save(results, f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("distributed"))
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=WORLD)
    return [torch.load(f"{folder}/{process}.pt", weights_only=True) for process in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one(case, results):
    start, expected = dict(model(case[1]).named_parameters()), run("single", *case[1:])
    trained = [name for name, p in start.items() if p.requires_grad]
    assert all((expected[name] - start[name]).abs().max() > 1e-3 for name in trained)
    for result in (process[case] for process in results):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert (result[name] - value).abs().max() <= 1e-8, name
