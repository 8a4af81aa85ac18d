"""What a step keeps and how often it waits, operation by operation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill import load_pipeline, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.compute.fused_lora import FusedLoraLinear, use_fused_lora
from lit_distill.planning.counter import Counter
from lit_distill.planning.planner import MODES
from lit_distill.preflight.probe import Probe

CALL = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def probe():
    pipe = load_pipeline("tiny-digits", torch_dtype="float32")
    make_trainable(pipe, {"r": 4})
    return Probe(pipe, "a red seven on a blue background", 4, 0, dict(CALL))


def test_selective_keeps_the_attention_besides_and_less_than_all(probe):
    def saved(mode):
        generator = [torch.Generator().manual_seed(0)]
        with Counter() as live:
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
        with Counter() as live:
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


@pytest.mark.parametrize("mode", MODES)
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
