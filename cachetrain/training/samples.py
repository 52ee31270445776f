"""Pictures of what the model draws, while it trains."""

from cachetrain.modeling import load
from cachetrain.modeling.pictures import grid, render, sample_name, save_png
from cachetrain.modeling.schedulers import sampler_for
from cachetrain.modeling.text import encode_like_cache


class Samples:
    """Draws the same prompts from the same noise again and again.

    Prompts are encoded once, here, and the text encoder is dropped before training starts. Noise comes from
    generators of its own, so drawing never changes training.

    Args:
        model_dir: pipeline directory with text encoder and VAE.
        prompts: list of str.
        cfgs: guidance scales; all start from the same noise.
        index: PairIndex, which says how captions were encoded and how large latents are.
    """

    def __init__(self, model_dir, prompts, cfgs, scheduler, index, text_scale, steps, device):
        self.prompts, self.cfgs, self.num_inference_steps = prompts, cfgs, steps
        self.scheduler, self.device = sampler_for(scheduler), device
        self.masked, self.latent_size = index.masked, index.shapes[0][1:]
        text = text_info(index)
        encoded = encode_like_cache(model_dir, text["kind"], text["settings"], ["", *prompts], device)
        self.null, *self.embeddings = (embedding * text_scale for embedding in encoded)
        self.vae = load.load_vae(load.component_dir(model_dir, "vae"))

    def draw(self, unet, directory, metrics, step, autocast):
        """Writes one PNG per prompt and cfg into `directory`, and a labelled strip per prompt to TensorBoard."""
        training = unet.training
        unet.eval()
        self.vae.to(self.device)
        seeds, rows = list(range(len(self.prompts))), []
        for cfg in self.cfgs:
            with autocast():
                images = render(unet, self.vae, self.scheduler, self.embeddings, self.null, cfg, seeds,
                                self.latent_size, self.num_inference_steps, self.masked)  # fmt: skip
            rows.append(images)
            for i, (prompt, image) in enumerate(zip(self.prompts, images, strict=True)):
                save_png(
                    image, directory / sample_name(i, prompt, cfg), prompt=prompt, negative_prompt="", seed=seeds[i],
                    cfg=f"{cfg:g}", step=step, num_inference_steps=self.num_inference_steps,
                    scheduler=type(self.scheduler).__name__,
                )  # fmt: skip
        for i, prompt in enumerate(self.prompts):
            strip = grid([row[i] for row in rows], [f"cfg {cfg:g}" for cfg in self.cfgs], len(self.cfgs))
            metrics.image(f"12_Generated_Samples/{i:02d} {prompt[:60]}", strip, step)
        self.vae.to("cpu")
        unet.train(training)


def read_prompts(path):
    """Reads prompts, one a line, blank lines skipped."""
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def text_info(index):
    """How captions were encoded, as a checkpoint must remember it, so that prompts are encoded alike later."""
    return {"kind": "txt_t5cache" if index.masked else "txt_clipl", "settings": index.text_settings}
