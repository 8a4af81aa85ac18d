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
from lit_distill.preflight.memory import GIB, MODES_BY_SPEED, LiveBytes, choose
from lit_distill.preflight.probe import Probe
from lit_distill.training import autoconfigure

CALL = {"height": 64, "width": 64}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trial():
    pipe = load_pipeline("tiny-digits", torch_dtype="float32")
    make_trainable(pipe, {"r": 4})
    return Probe(pipe, "a red seven on a blue background", 4, 0, dict(CALL))


def peak(trial, mode):
    """The most that lives in a step of training, counted."""
    with LiveBytes() as live, trial.gradient(mode):
        pass
    return live.peak


def test_selective_keeps_the_attention_besides_and_less_than_all(trial):
    def saved(mode):
        generator = [torch.Generator().manual_seed(0)]
        with LiveBytes() as live:
            latents = rollout(
                trial.pipe,
                prompt=[trial.prompt],
                num_inference_steps=4,
                generator=generator,
                checkpointing=mode,
                **CALL,
            )
            return live.now, latents

    saved("block")  # the number of blocks is known from here on
    block, selective, every = (saved(mode)[0] for mode in ("block", "selective", "none"))
    config = trial.pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    tokens = (CALL["height"] // 8) ** 2 + trial.pipe.encode_prompt(trial.prompt)[0].shape[1]
    # What attention returns of every block that is run again: output and log-sum-exp.
    kept = 4 * tokens * (width + config.num_attention_heads) * (4 * config.num_layers - 1)
    assert selective - block == pytest.approx(kept, rel=0.05)
    assert selective < 0.5 * every


@pytest.mark.parametrize("mode", MODES_BY_SPEED)
def test_need_of_all_steps_is_known_from_two(trial, mode):
    one, two = (measured._activations(trial, CPU, mode, steps) for steps in (1, 2))
    peak(trial, mode)  # the number of blocks is known from here on
    assert one + 3 * (two - one) == pytest.approx(peak(trial, mode), rel=0.15)


def needs(trial, monkeypatch, free, modes=MODES_BY_SPEED, times=1.0):
    monkeypatch.setattr(measured, "free_bytes", lambda device: free)
    return choose(trial, CPU, modes, times, 4)


def test_auto_takes_the_fastest_that_fits_and_says_why(trial, monkeypatch):
    everything = needs(trial, monkeypatch, 10 * GIB)
    assert everything.mode == "none" and everything.fits
    assert re.fullmatch(r"GiB needed: none [\d.e-]+; free on cpu: 10", everything.why)
    nothing = needs(trial, monkeypatch, 0)
    assert not nothing.fits
    found = dict(re.findall(r"(\w+) ([\d.e-]+)[,;]", nothing.why))
    assert list(found) == list(MODES_BY_SPEED)
    sizes = {mode: float(size) * GIB for mode, size in found.items()}
    assert nothing.mode == min(sizes, key=sizes.get)
    for mode in ("selective", "block"):
        fits = needs(trial, monkeypatch, 1.01 * sizes[mode])
        assert fits.mode == mode and fits.fits
    # Twice the positions need twice the memory, and what preflight finds wrong is not taken.
    assert needs(trial, monkeypatch, 1.01 * sizes["none"], times=2.0).mode != "none"
    assert needs(trial, monkeypatch, 10 * GIB, modes=("step", "block")).mode == "block"


def test_auto_is_settled_before_training_and_noted(pairs, tmp_path, monkeypatch, caplog):
    said = []
    monkeypatch.setattr(autoconfigure, "rank_zero_info", said.append)
    model = DirectDistill(
        "tiny-digits", torch_dtype="float32", lora={"r": 4}, checkpointing="auto", preflight=False
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=CSVLogger(tmp_path)
    )
    trainer.fit(model, DistillDataModule(str(pairs / "train/metadata.csv"), batch_size=2))
    assert model.hparams["checkpointing"] == "none"
    assert said[0].startswith("model.checkpointing: auto takes none; GiB needed: none ")
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert checkpoint["hyper_parameters"]["checkpointing"] == "none"


def test_auto_without_data_to_settle_it_is_refused():
    model = DirectDistill("tiny-digits", checkpointing="auto")
    with pytest.raises(ValueError, match="auto is chosen when a training with DistillDataModule"):
        rollout(
            load_pipeline("tiny-digits"),
            prompt=["a"],
            num_inference_steps=2,
            generator=[torch.Generator()],
            checkpointing=model.hparams["checkpointing"],
        )
    with pytest.raises(ValueError, match="does not count with offloading"):
        DirectDistill("tiny-digits", checkpointing="auto", offload_activations=True)
    with pytest.raises(ValueError, match="with checkpointing nested there is nothing to move"):
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
def test_a_rollout_and_its_backward_pass_wait_for_the_device_no_more_than_the_pipeline(trial, mode):
    def generator():
        return [torch.Generator().manual_seed(0)]

    call = {"prompt": [trial.prompt], "num_inference_steps": 4, **CALL}
    with Waits() as plain:
        trial.pipe(**call, generator=generator(), output_type="latent", true_cfg_scale=1.0)
    with Waits() as ours:
        rollout(trial.pipe, **call, generator=generator(), checkpointing=mode).sum().backward()
    assert plain.seen > 0  # the mode does see them
    assert ours.seen == plain.seen
