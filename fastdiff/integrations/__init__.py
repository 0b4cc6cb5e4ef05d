"""What other libraries see of fastdiff: diffusers, k-diffusion, ComfyUI. Nothing here is imported by the core."""
