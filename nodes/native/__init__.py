"""ComfyUI's own MODEL, CLIP, VAE, LATENT and CONDITIONING: adapters to and from ours."""
