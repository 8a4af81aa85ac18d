"""Trains the embedded "tiny-digits" pipeline from scratch on a CPU.

The result is a real ``diffusers.QwenImagePipeline`` folder of under 2 MB that draws 32x32
coloured handwritten digits from prompts such as "a red handwritten seven on a blue background".
Every part has the class and the behaviour of its Qwen-Image counterpart and only the sizes
differ, so code that runs on this pipeline runs on the large one. Nothing is downloaded: the
training pictures are scikit-learn's bundled 8x8 scans, enlarged and coloured.

Run it from the repository root (about ten minutes on one core):

    python scripts/train_tiny_digits.py
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from PIL import Image
from safetensors.torch import save_file
from tiny_digits import (
    NEGATIVE_PROMPT,
    SIZE,
    TRIPLES,
    DigitPictures,
    build_pipeline,
    is_held_out,
    prompt_of,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_distill.evaluation.feature_extractors import DigitReader

BANK_SIZE = 20_000
TEACHER_STEPS, TEACHER_CFG = 50, 4.0
FEW_STEPS = 4


def convolve_frame(conv: nn.Conv3d, frame: Tensor, cached: Tensor | None = None) -> Tensor:
    """Does a causal 3-D convolution's work on a single frame, several times faster.

    Causal padding puts a lone frame under the kernel's last temporal slice and zeros under the
    others, so that slice alone, as a 2-D convolution, gives exactly the same result.
    """
    if cached is not None:
        raise ValueError("only single frames can be convolved this way")
    padding = conv.kernel_size[-1] // 2
    out = F.conv2d(frame.squeeze(2), conv.weight[:, :, -1], conv.bias, padding=padding)
    return out.unsqueeze(2)


def fit(
    name: str,
    module: nn.Module,
    steps: int,
    peak_rate: float,
    loss_at: Callable[[int], Tensor],
    after_step: Callable[[nn.Module], None] = lambda _: None,
) -> None:
    """Trains a module with AdamW under a one-cycle learning rate.

    A batch's loss comes from `loss_at`, which is given the step; `after_step` gets the module.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=peak_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    module.train()
    begun, total = time.perf_counter(), 0.0
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after_step(module)
        total += loss.item()
        if (step + 1) % 250 == 0:
            mean, seconds = total / 250, time.perf_counter() - begun
            print(f"{name}: {step + 1}/{steps}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
            total = 0.0
    module.eval()


def train_vae(vae: AutoencoderKLQwenImage, pictures: DigitPictures) -> float:
    """Trains the autoencoder.

    Returns:
        The reconstruction's peak signal-to-noise ratio in dB on fresh pictures.
    """

    def loss_at(_: int) -> Tensor:
        batch = pictures.sample(16)[0].unsqueeze(2)
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = error.abs().mean() + 0.5 * error.square().mean() + 0.02 * kl
        return loss

    fit("vae", vae, 2_500, 4e-3, loss_at)
    with torch.no_grad():
        for module in vae.modules():
            # A single frame never meets the earlier temporal slices; as zeros they compress away.
            if isinstance(module, QwenImageCausalConv3d):
                module.weight[:, :, :-1] = 0
        vae.half().float()
        batch = pictures.sample(512)[0].unsqueeze(2)
        error = vae.decode(vae.encode(batch).latent_dist.mode()).sample - batch
    return float(10 * torch.log10(4 / error.square().mean()))


def encode_bank(pipe: QwenImagePipeline, pictures: DigitPictures) -> tuple[Tensor, Tensor]:
    """Encodes the transformer's training set and writes its statistics into the VAE's config.

    Returns:
        Packed, normalised latents of shape (BANK_SIZE, 16, 16), and indexes into TRIPLES.
    """
    latents, labels = [], []
    with torch.no_grad():
        for _ in range(BANK_SIZE // 500):
            batch, label = pictures.sample(500)
            latents.append(pipe.vae.encode(batch.unsqueeze(2)).latent_dist.mode().squeeze(2))
            labels.append(label)
    bank = torch.cat(latents)
    mean, std = bank.mean(dim=(0, 2, 3)), bank.std(dim=(0, 2, 3))
    pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    bank = (bank - mean[:, None, None]) / std[:, None, None]
    return pipe._pack_latents(bank, *bank.shape), torch.cat(labels)


def train_transformer(pipe: QwenImagePipeline, bank: Tensor, labels: Tensor) -> None:
    """Trains the denoiser by flow matching and keeps the moving average of its weights."""
    with torch.no_grad():
        prompts = [prompt_of(*triple) for triple in TRIPLES]
        embeds = pipe.encode_prompt(prompts)[0]
        blank = pipe.encode_prompt(NEGATIVE_PROMPT)[0]
    transformer = pipe.transformer
    ema = get_ema_multi_avg_fn(0.999)  # type: ignore[no-untyped-call]
    average = AveragedModel(transformer, multi_avg_fn=ema)

    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(len(bank), (64,))
        clean, noise, uniform = bank[chosen], torch.randn(64, *bank.shape[1:]), torch.rand(64)
        # Like the sampler's shift at this size, this spends more effort on noisy states.
        sigma = 1.4 * uniform / (1 + 0.4 * uniform)
        # Guidance needs to know the prediction for the negative prompt. Whole batches, because
        # that prompt is shorter than the others and mixing would need a mask.
        text = blank.expand(64, -1, -1) if step % 10 == 9 else embeds[labels[chosen]]
        velocity = transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            timestep=sigma,
            encoder_hidden_states=text,
            img_shapes=[[(1, 4, 4)]] * 64,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - clean)

    fit("transformer", transformer, 4_500, 3e-3, loss_at, average.update_parameters)
    transformer.load_state_dict(average.module.state_dict())


def score(reader: DigitReader, pictures: Tensor, triples: Tensor) -> str:
    """Returns the shares of digits, foregrounds and backgrounds that the reader reads right."""
    with torch.no_grad():
        read = torch.stack([logits.argmax(1) for logits in reader.read(pictures / 2 + 0.5)], dim=1)
    return ", ".join(f"{share:.1%}" for share in (read == triples).float().mean(dim=0).tolist())


def train_reader(pictures: DigitPictures, seed: int) -> tuple[DigitReader, str]:
    """Trains the classifier, and scores it on pictures of scans that it has not seen.

    Seeded on its own, so that it comes out the same whatever was trained before.
    """
    torch.manual_seed(seed)
    reader, triples = DigitReader(), torch.tensor(TRIPLES)

    def loss_at(_: int) -> Tensor:
        batch, labels = pictures.sample(64, slice(0, 1_500))
        logits = reader.read(batch / 2 + 0.5)
        digit, fore, back = map(F.cross_entropy, logits, triples[labels].T)
        return digit + fore + back

    fit("reader", reader, 1_000, 3e-3, loss_at)
    batch, labels = pictures.sample(1_000, slice(1_500, None))
    return reader, score(reader, batch, triples[labels])


def save_reader(reader: DigitReader, path: Path) -> None:
    """Saves the classifier, which metrics look at pictures through, in fp16."""
    half = {n: t.half() if t.is_floating_point() else t for n, t in reader.state_dict().items()}
    save_file(half, path)
    path.chmod(0o644)


def sample(
    pipe: QwenImagePipeline, prompts: list[str], steps: int, cfg: float
) -> tuple[Tensor, Tensor]:
    """Generate one picture per prompt, the i-th from seed i.

    Returns:
        The final packed latents, and the pictures in [-1, 1].
    """
    latents = pipe(
        prompts,
        negative_prompt=[NEGATIVE_PROMPT] * len(prompts) if cfg > 1 else None,
        true_cfg_scale=cfg,
        height=SIZE,
        width=SIZE,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="latent",
    ).images
    config, shape = pipe.vae.config, (1, -1, 1, 1, 1)
    spread = torch.tensor(config.latents_std).view(shape)
    z = pipe._unpack_latents(latents, SIZE, SIZE, pipe.vae_scale_factor) * spread
    with torch.no_grad():
        decoded = pipe.vae.decode(z + torch.tensor(config.latents_mean).view(shape)).sample
    return latents, decoded[:, :, 0]


def save_preview(path: Path, left: Tensor, right: Tensor) -> None:
    """Saves two 8x8 contact sheets side by side, four times enlarged."""
    sheets = [p[:64].view(8, 8, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2) for p in (left, right)]
    pixels = torch.cat([s.reshape(8 * SIZE, 8 * SIZE, 3) for s in sheets], dim=1)
    image = Image.fromarray(((pixels + 1) * 127.5).round().byte().numpy())
    image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST).save(path)


def evaluate(
    pipe: QwenImagePipeline, stored: QwenImagePipeline, reader: DigitReader, preview: Path | None
) -> dict[str, str]:
    """Measures what the pipeline draws, as trained and as stored.

    Args:
        pipe: The pipeline in fp32.
        stored: The pipeline after its storage in fp16.
        reader: The classifier.
        preview: Where to save a contact sheet, if anywhere.

    Returns:
        Figures on four seeds of every held-out prompt, by description.
    """
    triples = [triple for triple in TRIPLES if is_held_out(*triple)] * 4
    random.Random(0).shuffle(triples)
    prompts = [prompt_of(*triple) for triple in triples]
    begun = time.process_time()
    teacher, pictures = sample(stored, prompts, TEACHER_STEPS, TEACHER_CFG)
    cost = (time.process_time() - begun) / len(prompts)
    few, few_pictures = sample(stored, prompts, FEW_STEPS, 1.0)
    exact = sample(pipe, prompts, TEACHER_STEPS, TEACHER_CFG)[0]
    if preview:
        save_preview(preview, pictures, few_pictures)
    full, short = f"{TEACHER_STEPS} steps at cfg {TEACHER_CFG:g}", f"{FEW_STEPS} steps at cfg 1"
    truth = torch.tensor(triples)
    return {
        "pictures drawn from held-out prompts": str(len(prompts)),
        f"{full}: the same shares": score(reader, pictures, truth),
        f"{short}: the same shares": score(reader, few_pictures, truth),
        f"{short}: latent MSE to {full}": f"{F.mse_loss(few, teacher):.4f}",
        f"{full}: latent MSE of fp16 storage": f"{F.mse_loss(exact, teacher):.1e}",
        f"{full}: CPU time per picture, in a batch": f"{cost * 1e3:.0f} ms",
    }


def rename_for_older_readers(folder: Path) -> None:
    """Uses names of settings that transformers 4 knows; version 5 reads them but writes others."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    path = folder / "text_encoder" / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    text = settings["text_config"]
    text["rope_scaling"] = text.pop("rope_parameters")
    text["rope_theta"] = text["rope_scaling"]["rope_theta"]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save(pipe: QwenImagePipeline, folder: Path) -> QwenImagePipeline:
    """Saves the pipeline in fp16 with its prompt lists, and reads it back in fp32."""
    # The pipeline's class has one default size for all checkpoints: `load_pipeline` reads this one.
    pipe.transformer.register_to_config(_default_sample_size=SIZE // pipe.vae_scale_factor)
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder)
    prompts: dict[bool, list[str]] = {False: [], True: []}
    for triple in TRIPLES:
        prompts[is_held_out(*triple)].append(prompt_of(*triple))
    for held_out, name in ((False, "prompts_train.txt"), (True, "prompts_heldout.txt")):
        # Shuffled, so that any first few lines show a bit of everything.
        random.Random(0).shuffle(prompts[held_out])
        (folder / name).write_text("\n".join(prompts[held_out]) + "\n", encoding="utf-8")
    # The vocabulary once more, in the two files that transformers 4 reads it from.
    pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    rename_for_older_readers(folder)
    for file in folder.rglob("*.safetensors"):
        # Some library versions save weights for their owner only; package data is for everyone.
        file.chmod(0o644)
    stored = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    stored.set_progress_bar_config(disable=True)
    return stored


README = """\
# tiny-digits

A real `diffusers.QwenImagePipeline` (890 thousand parameters, in fp16) that draws 32x32 coloured
handwritten digits from prompts such as "a red handwritten seven on a blue background". It knows
the words of `prompts_train.txt` and no others. Pass `height=32, width=32`.

Made by `scripts/train_tiny_digits.py` (seed {seed}) from scikit-learn's `load_digits` alone. It was
trained on all 560 prompts. Those in `prompts_heldout.txt` are kept out of every distillation set,
so that students can be measured on them.

| measured | |
|---|---|
{rows}

The scans behind `load_digits` are the test part of *Optical Recognition of Handwritten Digits*
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998), licensed under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). They were enlarged, jittered and coloured
for training.
"""


def main() -> None:
    """Trains, saves and measures the pipeline."""
    parser = argparse.ArgumentParser(
        description="Trains the embedded tiny-digits pipeline.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default="lit_distill/assets/tiny", help="folder")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--preview", type=Path, metavar="PNG", help="contact sheet to save as well")
    parser.add_argument("--reader-only", action="store_true", help="train the classifier only")
    arguments = parser.parse_args()
    # More threads do not speed up tensors this small, and would change the rounding.
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    pictures = DigitPictures()
    # Beside the folder of the pipeline, which holds what diffusers expects and nothing else.
    reader_path = arguments.out.parent / "digit_reader.safetensors"
    if arguments.reader_only:
        reader, accuracy = train_reader(pictures, arguments.seed)
        save_reader(reader, reader_path)
        print(f"digit, foreground, background read right: {accuracy}")
        return
    pipe = build_pipeline()
    with mock.patch.object(QwenImageCausalConv3d, "forward", convolve_frame):
        figures = {"autoencoder PSNR": f"{train_vae(pipe.vae, pictures):.1f} dB"}
        bank, labels = encode_bank(pipe, pictures)
    train_transformer(pipe, bank, labels)
    reader, figures["classifier on scans new to it: digit, foreground, background read right"] = (
        train_reader(pictures, arguments.seed)
    )
    stored = save(pipe, arguments.out)
    save_reader(reader, reader_path)
    figures |= evaluate(pipe, stored, reader, arguments.preview)
    figures["CPU time of the whole script"] = f"{time.process_time():.0f} s"
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    readme = README.format(seed=arguments.seed, rows=rows)
    (arguments.out / "README.md").write_text(readme, encoding="utf-8")
    print(rows)


if __name__ == "__main__":
    main()
