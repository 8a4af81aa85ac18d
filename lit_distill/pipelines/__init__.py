"""Any diffusers pipeline, run with gradients on: loading, guidance, rollout, latent codec.

A rollout equals `pipe()` bit for bit. A family is at most one line in `guidance.FAMILIES`.
Must not know where prompts come from, what is trained, or that there is a teacher.
"""
