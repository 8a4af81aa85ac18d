"""What any diffusers pipeline does, run with gradients on: loading, guidance, rollout, latents.

A rollout equals `pipe()` bit for bit; a family is at most a line in `guidance.FAMILIES`.
Must not know where prompts come from, what is trained, or that a teacher exists.
"""
