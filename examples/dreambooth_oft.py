"""DreamBooth with OFT: teach Stable Diffusion one subject from a few photos, with diffusers.

OFT was made for this: a rotation keeps the angles between neurons. There is no prior preservation here.
Needs: pip install . diffusers datasets pillow, and a GPU: the weights of Stable Diffusion 1.5 are 2.1 GB in
       bfloat16, and images of 512 × 512 need several times that. --smoke runs on a CPU.
Run:   python examples/dreambooth_oft.py --data diffusers/dog-example --prompt "a photo of sks dog"
       python examples/dreambooth_oft.py --smoke
"""

import argparse

import torch
from datasets import load_dataset
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from torch.nn.functional import mse_loss

import smoke
from isotune import OFTConfig, get_peft_model

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--data", default="diffusers/dog-example", help="photos of the subject, in a column `image`")
    parser.add_argument("--prompt", default="a photo of sks dog", help="with a rare word for the subject")
    parser.add_argument("--output", default="runs/dreambooth")
    parser.add_argument("--smoke", action="store_true", help="tiny stand-ins made here, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        smoke.diffusion_pipeline(options.model)
        smoke.images(options.data, count=5)
    size, steps, rate = (32, 20, 5e-3) if options.smoke else (512, 400, 1e-4)

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(options.model, safety_checker=None).to(DEVICE, DTYPE)
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    photos = [image.convert("RGB") for image in load_dataset(options.data, split="train")["image"]]
    with torch.no_grad():  # the encoders stay as they are, so each photo and the prompt are read once
        pixels = pipe.image_processor.preprocess(photos, size, size, resize_mode="crop")
        encoded = pipe.vae.encode(pixels.to(DEVICE, DTYPE)).latent_dist
        text, _ = pipe.encode_prompt(options.prompt, DEVICE, 1, do_classifier_free_guidance=False)

    config = OFTConfig(oft_block_size=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    model = get_peft_model(pipe.unet, config).train()
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)

    def loss_of(photo: int) -> torch.Tensor:
        latents = encoded.sample()[[photo]] * pipe.vae.config.scaling_factor
        noise, times = torch.randn_like(latents), torch.randint(0, 1000, (1,), device=DEVICE)
        found = model(noising.add_noise(latents, noise, times), times, text).sample
        return mse_loss(found.float(), noise.float())

    @torch.no_grad()
    def score() -> float:  # always with the same noise, as the loss of a step says little
        torch.manual_seed(1)
        return sum(float(loss_of(photo)) for photo in range(len(photos)) for _ in range(4)) / len(photos) / 4

    before = score()
    for step in range(steps):
        loss_of(step % len(photos)).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss: {before:.4f} before, {score():.4f} after")
    model.save_pretrained(options.output)

    # Merged, the UNet is one of diffusers again; `isotune export --to kohya` writes a file for ComfyUI and others.
    plain = UNet2DConditionModel.from_pretrained(options.model, subfolder="unet").to(DEVICE, DTYPE)
    pipe.unet = PeftModel.from_pretrained(plain, options.output).merge_and_unload()
    picture = pipe(f"{options.prompt} in a bucket", height=size, width=size).images[0]
    picture.save(f"{options.output}/bucket.png")
    print(f"{options.output}/bucket.png: {picture.width} × {picture.height}")


if __name__ == "__main__":
    main()
