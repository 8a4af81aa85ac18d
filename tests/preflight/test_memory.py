import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill import DirectDistill, DistillDataModule, load_pipeline, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.compute.fused_lora import FusedLoraLinear, use_fused_lora
from lit_distill.preflight import memory as measured
from lit_distill.preflight.memory import GIB, MODES_BY_SPEED, LiveBytes, choose_checkpointing
from lit_distill.preflight.probe import Probe
from lit_distill.training import autoconfigure

CALL = {"height": 64, "width": 64}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def probe():
    pipe = load_pipeline("tiny-digits", torch_dtype="float32")
    make_trainable(pipe, {"r": 4})
    return Probe(pipe, "a red seven on a blue background", 4, 0, dict(CALL))


def peak(probe, mode):
    """The most that lives in a step of training, counted."""
    with LiveBytes() as live, probe.gradient(mode):
        pass
    return live.peak


def test_selective_keeps_the_attention_besides_and_less_than_all(probe):
    def saved(mode):
        generator = [torch.Generator().manual_seed(0)]
        with LiveBytes() as live:
            latents = rollout(
                probe.pipe,
                prompt=[probe.prompt],
                num_inference_steps=4,
                generator=generator,
                checkpointing=mode,
                **CALL,
            )
            return live.now, latents

    saved("block")  # the number of blocks is known from here on
    block, selective, every = (saved(mode)[0] for mode in ("block", "selective", "none"))
    config = probe.pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    tokens = (CALL["height"] // 8) ** 2 + probe.pipe.encode_prompt(probe.prompt)[0].shape[1]
    # What attention returns of every block that is run again: output and log-sum-exp.
    kept = 4 * tokens * (width + config.num_attention_heads) * (4 * config.num_layers - 1)
    assert selective - block == pytest.approx(kept, rel=0.05)
    assert selective < 0.5 * every


@pytest.mark.parametrize("mode", MODES_BY_SPEED)
def test_need_of_all_steps_is_known_from_two(probe, mode):
    one, two = (measured._activations(probe, CPU, mode, steps) for steps in (1, 2))
    peak(probe, mode)  # the number of blocks is known from here on
    assert one + 3 * (two - one) == pytest.approx(peak(probe, mode), rel=0.15)


def needs(probe, monkeypatch, free, modes=MODES_BY_SPEED, times=1.0):
    monkeypatch.setattr(measured, "free_bytes", lambda device: free)
    return choose_checkpointing(probe, CPU, modes, times, 4)


def test_auto_chooses_the_fastest_that_fits_and_reports_why(probe, monkeypatch):
    everything = needs(probe, monkeypatch, 10 * GIB)
    assert everything.mode == "none" and everything.fits
    assert re.fullmatch(r"GiB needed: none [\d.e-]+; free on cpu: 10", everything.reason)
    nothing = needs(probe, monkeypatch, 0)
    assert not nothing.fits
    found = dict(re.findall(r"(\w+) ([\d.e-]+)[,;]", nothing.reason))
    assert list(found) == list(MODES_BY_SPEED)
    sizes = {mode: float(size) * GIB for mode, size in found.items()}
    assert nothing.mode == min(sizes, key=sizes.get)
    for mode in ("selective", "block"):
        fits = needs(probe, monkeypatch, 1.01 * sizes[mode])
        assert fits.mode == mode and fits.fits
    # Twice the positions need twice the memory, and what preflight finds wrong is not taken.
    assert needs(probe, monkeypatch, 1.01 * sizes["none"], times=2.0).mode != "none"
    assert needs(probe, monkeypatch, 10 * GIB, modes=("step", "block")).mode == "block"


def test_auto_is_decided_before_training_and_saved(pairs, tmp_path, monkeypatch, caplog):
    logged = []
    monkeypatch.setattr(autoconfigure, "rank_zero_info", logged.append)
    model = DirectDistill(
        "tiny-digits", torch_dtype="float32", lora={"r": 4}, checkpointing="auto", preflight=False
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=CSVLogger(tmp_path)
    )
    trainer.fit(model, DistillDataModule(str(pairs / "train/metadata.csv"), batch_size=2))
    assert model.hparams["checkpointing"] == "none"
    assert logged[0].startswith("model.checkpointing: auto chooses none; GiB needed: none ")
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert checkpoint["hyper_parameters"]["checkpointing"] == "none"


def test_auto_without_training_data_is_refused():
    model = DirectDistill("tiny-digits", checkpointing="auto")
    with pytest.raises(ValueError, match="auto is resolved when training with DistillDataModule"):
        rollout(
            load_pipeline("tiny-digits"),
            prompt=["a"],
            num_inference_steps=2,
            generator=[torch.Generator()],
            checkpointing=model.hparams["checkpointing"],
        )
    with pytest.raises(ValueError, match="does not support offloading"):
        DirectDistill("tiny-digits", checkpointing="auto", offload_activations=True)
    with pytest.raises(ValueError, match="and checkpointing nested stores none"):
        DirectDistill("tiny-digits", checkpointing="nested", offload_activations=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "lean"), [(4, True), (8, True), (3, False)])
def test_lora_in_place_is_peft_bit_for_bit(dtype, alpha, lean):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 48))
    layer.requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    layer = inject_adapter_in_model(config, layer).to(dtype)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, 5, 48, dtype=dtype)

    def results():
        layer.zero_grad()
        x.grad = None
        with LiveBytes() as live:
            output = layer(x)
        (output * weights).sum().backward()
        factors = [p.grad for p in layer.parameters() if p.requires_grad]
        assert len(factors) == 2
        return live.peak, [output, x.grad, *factors]

    before, expected = results()
    use_fused_lora(layer)
    assert type(layer[0]) is FusedLoraLinear
    after, found = results()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (after < before) == lean  # another scale rounds twice in peft, and has to here


class Waits(TorchDispatchMode):
    """Counts operations after which the host would wait for a device."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.name().partition(".")[0] in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES_BY_SPEED)
def test_a_rollout_and_its_backward_pass_wait_for_the_device_no_more_than_the_pipeline(probe, mode):
    def generator():
        return [torch.Generator().manual_seed(0)]

    call = {"prompt": [probe.prompt], "num_inference_steps": 4, **CALL}
    with Waits() as plain:
        probe.pipe(**call, generator=generator(), output_type="latent", true_cfg_scale=1.0)
    with Waits() as ours:
        rollout(probe.pipe, **call, generator=generator(), checkpointing=mode).sum().backward()
    assert plain.seen > 0  # the mode does see them
    assert ours.seen == plain.seen
