"""torch.distributed.checkpoint: save, load into everything anew, continue as if nothing was."""

import io
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from prodigyopt import Prodigy
from tiny_blocks import blocks, losses
from tiny_models import DECODER, adapted
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
from transformers import TrainingArguments

import oplora

WORLD, STEPS, MORE = 2, 6, 3
FORMS = {
    "exact": dict(),
    "lite": dict(lite=True),
    "any": dict(optimizer_cls=torch.optim.NAdam),
    "momentum": dict(optimizer_cls=torch.optim.SGD, momentum=0.9),
    "stateless": dict(optimizer_cls=torch.optim.SGD),
    "prodigy": dict(optimizer_cls=Prodigy),  # its groups have state, too
    "factored": dict(optimizer_cls=torch.optim.Adafactor),  # moments of a matrix' rows and columns
}
WAYS = {  # options of torch's functions
    "sharded": dict(),
    "flat": dict(flatten_optimizer_state_dict=True),
    "full": dict(full_state_dict=True),
    "offloaded": dict(full_state_dict=True, cpu_offload=True),
    "stateful": None,  # the optimizer itself is given to DCP
}
UNDER_FSDP2 = {
    "exact": [way for way in WAYS if way != "full"],
    "lite": ["sharded"],
    "any": ["full"],
}


def build(form, rank=3, sharded=False, **options):
    """DoRA on two layers, with parameters that are trained directly."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5), nn.Linear(5, 3))
    config = LoraConfig(
        r=rank, target_modules=["0", "2"], use_dora=True, bias="all", modules_to_save=["3"]
    )
    net = get_peft_model(layers, config)
    if sharded:
        fully_shard(net.base_model.model[0])
        fully_shard(net)
    options = dict(lr=0.1, mlp_width=16, z_dim=8, edited="raise", **FORMS[form]) | options
    create = oplora.create_oplora_optimizer
    if options.pop("lite", False):
        create = oplora.peft.create_oplora_lite_optimizer
    return net, create(net, **options)


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


def state_of(net, optimizer, options):
    return {
        "model": get_model_state_dict(net, options=options),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
    }


def set_state(net, optimizer, state, options):
    set_model_state_dict(net, state["model"], options=options)
    set_optimizer_state_dict(net, optimizer, state["optimizer"], options=options)


def load(resumed, folder, options):
    """As torch's guide has it: what the new ones hold is loaded over, and set."""
    state = state_of(*resumed, options)
    dcp.load(state, checkpoint_id=folder)
    set_state(*resumed, state, options)


def carry(saved, resumed, way, folder):
    """Bring the state of one model and optimizer into others."""
    if WAYS[way] is None:
        names = ("model", "optimizer")
        dcp.save(dict(zip(names, saved, strict=True)), checkpoint_id=folder)
        dcp.load(dict(zip(names, resumed, strict=True)), checkpoint_id=folder)
        return
    options = StateDictOptions(**WAYS[way])
    state = state_of(*saved, options)
    if not options.full_state_dict:
        dcp.save(state, checkpoint_id=folder)
        load(resumed, folder, options)
        return
    file = io.BytesIO()  # one file, of rank 0 for all where the others have nothing
    torch.save(state, file)
    file.seek(0)
    options.broadcast_from_rank0 = options.cpu_offload and dist.is_initialized()
    set_state(*resumed, torch.load(file, weights_only=True), options)


def resume(form, ways, folder, saved_at=STEPS, **where):
    """Parameters of an uninterrupted training, and of those that are saved and resumed."""
    whole, saved = build(form, **where), build(form, **where)
    train(*whole, 0, STEPS + MORE)
    train(*saved, 0, saved_at)
    results = []
    for way in ways:
        resumed = build(form, **where)
        rows = kept_rows(resumed[1])
        carry(saved, resumed, way, f"{folder}/{form}-{way}")
        if form == "exact" and saved_at:
            assert kept_rows(resumed[1]) != rows  # which DCP could not load as they are
        train(*resumed, saved_at, STEPS + MORE)
        results.append(values(resumed[0]))
    return values(whole[0]), results


def assert_same(whole, results):
    for way, result in enumerate(results):
        for name, value in whole.items():
            assert torch.equal(result[name], value), (way, name)


@pytest.mark.parametrize("form", FORMS)
def test_resume_is_bit_identical(form, tmp_path):
    assert_same(*resume(form, WAYS, tmp_path))


@pytest.mark.parametrize("form", ["exact", "any", "prodigy"])
def test_what_was_saved_before_the_first_step_makes_it_as_the_first(form, tmp_path):
    assert_same(*resume(form, ["flat", "sharded"], tmp_path, saved_at=0))


@pytest.mark.parametrize("form", ["exact", "lite", "any"])
def test_a_trained_optimizer_goes_back(form, tmp_path):
    whole = build(form)
    train(*whole, 0, STEPS)
    options = StateDictOptions()
    dcp.save(state_of(*whole, options), checkpoint_id=tmp_path)
    train(*whole, STEPS, STEPS + MORE)
    expected = values(whole[0])
    expected = {name: value.clone() for name, value in expected.items()}
    load(whole, tmp_path, options)
    train(*whole, STEPS, STEPS + MORE)
    assert_same(expected, [values(whole[0])])


def test_no_step_is_made_for_tensors_that_are_trained_directly():
    net, optimizer = build("exact", mlp_width=0)
    before = {name: value.clone() for name, value in values(net).items()}
    get_optimizer_state_dict(net, optimizer)
    assert not optimizer.trained and not optimizer.inner.state
    assert_same(before, [values(net)])


def test_the_state_is_small_where_dcp_does_not_ask():
    data = blocks(torch.float32)
    optimizer = oplora.OPAdamW(data, mlp_width=32)
    losses(data).backward()
    optimizer.step()
    rows, P = optimizer.stacks[0].rows.active[0], data[0][0].numel() + data[0][1].numel()
    assert 0 < rows < 32
    entry = optimizer.state_dict()["state"][0]
    assert entry["mlp"]["W2"].shape == entry["inner"]["W2"]["exp_avg"].shape == (rows, P)


def test_foreign_states_are_refused():
    net, optimizer = build("exact")
    options = StateDictOptions()
    before = optimizer.state_dict()["state"][0]["mlp"]["W2"].clone()
    for saved, words in [
        (build("exact", shared_trunk=False), "with other blocks"),
        (build("exact", mlp_width=0), "without MLPs"),
        (build("exact", mlp_width=8), "another mlp_width"),
        (build("exact", seed=1), "saved with seed=1"),
    ]:
        with pytest.raises(ValueError, match=words):
            set_state(net, optimizer, state_of(*saved, options), options)
    direct = build("exact", mlp_width=0)
    with pytest.raises(ValueError, match="trained directly here"):
        set_state(*direct, state_of(net, optimizer, options), options)
    assert torch.equal(optimizer.state_dict()["state"][0]["mlp"]["W2"], before)


# Two processes


def worker(process, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(process), LOCAL_RANK=str(process))
    os.environ.update(WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=process, world_size=WORLD)
    torch.set_num_threads(1)
    results = {  # of rank 1, so that one process holds no value of A
        form: resume(form, ways, folder, rank=1, sharded=True) for form, ways in UNDER_FSDP2.items()
    }
    net, _ = build("exact", sharded=True)
    factors = [p for name, p in net.named_parameters() if "lora_A" in name or "lora_B" in name]
    with pytest.raises(ValueError, match="not elementwise"):
        oplora.OPOptimizer(factors, torch.optim.Adafactor).state_dict()
    results["trainer"] = through_trainer(folder)
    torch.save(results, f"{folder}/{process}.pt")
    dist.destroy_process_group()


def through_trainer(folder):
    """As `resume`, by OPTrainer; accelerate has FSDP2 on accelerators only: it is told of some."""

    def told(self, *args, init=PartialState.__init__, **kw):
        init(self, *args, **kw)
        self.distributed_type = DistributedType.MULTI_GPU

    def trained(checkpoint=None):
        data = [{"input_ids": tokens, "labels": tokens} for tokens in DECODER.batch["input_ids"]]
        arguments = TrainingArguments(
            folder,
            learning_rate=1e-2,
            max_steps=4,
            save_steps=2,
            use_cpu=True,
            fsdp=True,
            fsdp_config=dict(version=2, transformer_layer_cls_to_wrap=["LlamaDecoderLayer"])
            | dict(state_dict_type="SHARDED_STATE_DICT"),
            report_to="none",
            disable_tqdm=True,
        )
        trainer = oplora.OPTrainer(adapted(), arguments, train_dataset=data * 4)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.is_fsdp_enabled and trainer.state.global_step == 4
        assert any(isinstance(p, DTensor) for p in trainer.model.parameters())
        return values(trainer.model)

    with mock.patch.object(PartialState, "__init__", told):
        return trained(), [trained(f"{folder}/checkpoint-2")]


@pytest.fixture(scope="module")
def under_fsdp2(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sharded"))
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=WORLD)
    paths = [f"{folder}/{process}.pt" for process in range(WORLD)]
    return folder, [torch.load(path, weights_only=True) for path in paths]


@pytest.mark.parametrize("form", [*UNDER_FSDP2, "trainer"])
def test_resume_is_bit_identical_under_fsdp2(form, under_fsdp2):
    for process in under_fsdp2[1]:
        assert_same(*process[form])


@pytest.mark.parametrize("way", ["sharded", "flat"])
def test_two_processes_save_and_one_goes_on(way, under_fsdp2):
    folder, (first, _) = under_fsdp2
    resumed = build("exact", rank=1)
    load(resumed, f"{folder}/exact-{way}", StateDictOptions(**WAYS[way]))
    train(*resumed, STEPS, STEPS + MORE)
    for name, value in values(resumed[0]).items():
        torch.testing.assert_close(value, first["exact"][0][name], rtol=0, atol=1e-5)
