"""Train a LoRA with a plain Trainer, without the command line.

    python examples/train.py CSV OUT [MAX_STEPS]

CSV is the table of pairs. The LoRA is written to the folder OUT/lora.
"""

import sys

import lightning.pytorch as pl

from lit_distill import DirectDistill, DistillDataModule, export_student


def main(metadata: str, out: str, max_steps: int = 250) -> None:
    """Distil the embedded pipeline on `metadata` and write the LoRA below `out`."""
    data = DistillDataModule(metadata_path=metadata, val_fraction=0.125, batch_size=16)
    model = DirectDistill(
        pretrained_model_name_or_path="tiny-digits",  # or a hub id, or a folder
        torch_dtype="float32",
        lora={"r": 32},
        checkpointing="none",
    )
    trainer = pl.Trainer(
        max_steps=max_steps,
        gradient_clip_val=1.0,
        default_root_dir=out,
        use_distributed_sampler=False,  # the data module gives every process its share
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data)
    checkpoint = f"{out}/student.ckpt"
    trainer.save_checkpoint(checkpoint)
    print(f"LoRA written to {export_student(checkpoint, f'{out}/lora')}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
