import importlib.util
import sys
import weakref

import diffusers
import lightning.pytorch as pl
import pytest
import torch
from conftest import ROOT
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tiny_pipelines import build

from lit_distill import DirectDistill, DistillDataModule, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.cli import build_cli, main
from lit_distill.compute.quantization import quantization_config
from lit_distill.pipelines.components import denoisers, use_attention

SMALL = "--layers 2 --width 128 --image_tokens 64 --text_tokens 16 --steps 2 --rank 4 --repeats 1"
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "use_distributed_sampler": False}
QUIET |= {"enable_checkpointing": False}


@pytest.fixture(scope="module")
def step():
    """The benchmark, as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))  # which it imports from
    spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks" / "step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def counters(step):
    return sys.modules["counters"]


@pytest.fixture(scope="module")
def bare(step, counters):
    """The step of the benchmark without Lightning, by checkpointing mode."""
    options = step.parse(SMALL.split())
    pipe = step.make_pipeline(options)
    make_trainable(pipe, {"r": options.rank})
    options.prompt = step.make_prompt(pipe, options.text_tokens)
    options.target = torch.zeros(1, options.image_tokens, counters.CHANNELS)
    return lambda mode: step.Bare(pipe, mode, options)


def test_counted_flops_are_those_of_the_formula(step, counters, bare):
    known = bare("none")
    generator = [torch.Generator().manual_seed(0)]
    call = {"prompt": [known.options.prompt], "generator": generator, **known.options.size}
    with torch.no_grad(), counters.Flops() as counter:
        rollout(known.pipe, num_inference_steps=2, **call)
    with torch.no_grad(), counters.Flops() as encoder:
        known.pipe.encode_prompt([known.options.prompt])
    counted = counter.get_total_flops() - encoder.get_total_flops()
    text_width = known.pipe.transformer.config.joint_attention_dim
    assert counted == 2 * counters.forward_flops(known.options, text_width)
    # Step checkpointing recomputes each call but the last.
    again = step.counted(bare("step"))["GFLOP"] - step.counted(known)["GFLOP"]
    assert again == pytest.approx(counted / 2e9, rel=0.02)


class Saved:
    """What autograd itself saves and still holds when the forward pass is done."""

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def __init__(self, constants):
        self.constants = {tensor.untyped_storage().data_ptr() for tensor in constants}
        self.held = weakref.WeakSet()  # what leads nowhere is let go of

    def pack(self, tensor):
        held = self.Held(tensor)
        self.held.add(held)
        return held

    def forward_done(self):
        storages = [held.tensor.untyped_storage() for held in self.held]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.bytes = sum(size for key, size in sizes.items() if key not in self.constants)


def test_saved_bytes_are_those_that_autograd_saves(step, counters, bare):
    known = bare("none")
    known()
    transformer = known.pipe.transformer
    saved = Saved([*transformer.parameters(), transformer.pos_embed.pos_freqs])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        known(saved)
    assert step.counted(known)["saved_MiB"] == pytest.approx(saved.bytes / counters.MIB, rel=0.05)
    thrifty = bare("nested")
    thrifty()
    assert step.counted(thrifty)["saved_MiB"] < 0.1 * step.counted(known)["saved_MiB"]


def sampled_with(**options):
    """Return the loaded module and a sample of its untrained student."""
    options = {"torch_dtype": "float32", "lora": {"r": 4}} | options
    model = DirectDistill("tiny-digits", preflight=False, **options)
    model.configure_model()
    with torch.no_grad():
        latents = rollout(
            model.pipe,
            prompt=["a red seven on a blue background"],
            num_inference_steps=4,
            generator=[torch.Generator().manual_seed(0)],
        )
    return model, latents


@pytest.fixture
def backend_restored():
    """diffusers keeps the backend for the whole process."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def test_attention_is_computed_with_the_backend_that_is_set(backend_restored):
    _, expected = sampled_with()
    assert torch.equal(sampled_with(attention_backend="native")[1], expected)
    model, latents = sampled_with(attention_backend="_native_math")
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    used = {
        module.processor._attention_backend
        for module in denoisers(model.pipe)["transformer"].modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    }
    assert {backend.value for backend in used} == {"_native_math"}


def test_unusable_attention_backends_are_refused(backend_restored):
    with pytest.raises(ValueError, match=r"model.attention_backend 'cudnn'.*_native_cudnn"):
        sampled_with(attention_backend="cudnn")
    with pytest.raises(ValueError, match=r"model.attention_backend 'sage'.*install `sageattention"):
        sampled_with(attention_backend="sage")
    with pytest.raises(ValueError, match=r"UNet2DConditionModel .unet. does not take"):
        use_attention(build("StableDiffusionXL"), "native")


INT8 = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}


def test_quantised_weights_are_the_denoisers_and_the_lora_trains(pairs, tmp_path):
    # The base of every quantised tensor: Int8WeightOnlyConfig's class differs between versions.
    quantised = pytest.importorskip("torchao.utils").TorchAOBaseTensor
    model, latents = sampled_with(quantization=INT8)
    layers = dict(model.denoisers.named_modules())
    base = layers["transformer.transformer_blocks.0.attn.to_q.base_layer"]
    assert isinstance(base.weight, quantised)
    encoder = model.pipe.text_encoder
    assert not any(isinstance(p, quantised) for p in encoder.parameters())
    exact = sampled_with()[1]
    assert 0 < (latents - exact).norm() / exact.norm() < 0.05
    before = {name: p.detach().clone() for name, p in model.trained().items()}
    trainer = pl.Trainer(max_steps=2, default_root_dir=tmp_path, **QUIET)
    data = DistillDataModule(str(pairs / "train/metadata.csv"), batch_size=4)
    trainer.fit(model, datamodule=data)
    assert all("lora" in name for name in before)
    moved = [name for name, p in model.trained().items() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before) / 2  # what has no gradient stays


def test_quantization_reaches_from_pretrained_for_the_denoisers_only(monkeypatch):
    """Without an installed quantiser: which configuration diffusers receives."""

    class Stand:
        def __init__(self, load_in_4bit=False, **kwargs):
            self.load_in_4bit = load_in_4bit

    mapping = diffusers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    monkeypatch.setitem(mapping, "bitsandbytes_4bit", Stand)
    asked = []

    class AskedError(Exception):
        pass

    def from_pretrained(source, **options):
        asked.append(options["quantization_config"])
        raise AskedError

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    nf4 = {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True}}
    with pytest.raises(AskedError):
        sampled_with(quantization=nf4)
    assert list(asked[0].quant_mapping) == ["transformer"]
    assert asked[0].quant_mapping["transformer"].load_in_4bit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": None}, "model.quantization: quantised weights can't be trained"),
        ({"teacher_lora": "some"}, "model.quantization and model.teacher_lora"),
        ({"quantization": {"backend": "torchao"}}, "unknown field 'backend'; accepted: quant_b"),
        ({"quantization": {"quant_backend": "nf4"}}, "unknown quant_backend 'nf4'; .*bitsandbytes"),
        (
            {"quantization": {"quant_backend": "torchao", "quant_kwargs": {"bits": 4}}},
            "unknown quant_kwargs 'bits'; accepted: modules_to_not_convert, quant_type",
        ),
    ],
)
def test_unsupported_quantization_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampled_with(**{"quantization": INT8} | options)


def test_a_missing_quantiser_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"torchao needs .* pip install 'lit-distill\[quant\]'"):
        quantization_config(INT8, ["transformer"])


def test_how_a_machine_computes_is_not_taken_from_a_checkpoint(pairs, tmp_path, backend_restored):
    data = ["--data.val_metadata_path", str(pairs / "heldout/metadata.csv")]
    train = ["--config", str(ROOT / "configs/tiny_lora.yaml"), "--trainer.max_steps", "1"]
    train += ["--data.metadata_path", str(pairs / "train/metadata.csv")]
    train += ["--trainer.default_root_dir", str(tmp_path), "--model.lora.r", "3"]
    main(["fit", *train, *data, "--model.attention_backend", "_native_math"])
    test = ["validate", "--ckpt_path", str(next(tmp_path.rglob("last.ckpt"))), *data]
    test += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    with pytest.warns(UserWarning, match="model.attention_backend=None differs from the check"):
        found = build_cli(test).model.hparams
    assert found["lora"]["r"] == 3  # a trait of the student
    assert found["attention_backend"] is None
    with pytest.warns(UserWarning, match="model.attention_backend='native' differs"):
        found = build_cli([*test, "--model.attention_backend", "native"]).model.hparams
    assert found["attention_backend"] == "native"
