"""What other trainers call their options, for users who come from them: docs/coming-from.md. Imports no torch."""

import argparse

OPTIMIZER_SPELLINGS = {"opt_lion": "lion", "py_lion": "lion"}

_NO_DISCRIMINATOR = "there is no adversarial loss; omit it"
_CACHED = "that is decided when the images are cached; see cache/create_img_sdxl.py --help"

# Options without an equal here, or whose equal takes other values: what to use.
INSTEAD = {
    # The trainer that cachetrain took its first options from.
    "--gradient_topk": "use --gradient_clip against large gradients",
    "--scheduler_at_epoch": "the rate changes with every step; omit it",
    "--scale_loss_with_accum": "the loss is always the mean over the effective batch; omit it",
    "--min_sigma": "flow matching trains all timesteps; use --timestep_range to leave some out",
    "--rex_start_factor": "the warm-up always starts from 0; set its length with --warmup_steps",
    "--rex_end_factor": "the warm-up always ends at the peak rate; set its length with --warmup_steps",
    "--learning_rate_decay": "use --scheduler linear, or linear_with_min_lr with --min_lr_rate",
    "--min_learning_rate": "use --min_lr_rate with --scheduler cosine_with_min_lr or linear_with_min_lr",
    "--initial_d": "use --optimizer prodigy --lr 1, which finds the rate itself",
    "--continue_steps": "use --resume latest with a higher --max_steps",
    "--reinit_attn": "use --reinit_attention",
    **dict.fromkeys(
        [f"--disc_{name}" for name in ("weight", "layers", "lr", "start", "warmup", "max_noise", "no_adaptive")],
        _NO_DISCRIMINATOR,
    ),
    # OneTrainer's presets.
    **dict.fromkeys(["--train_dtype", "--weight_dtype"], "use --precision"),
    "--base_model_name": "use --model",
    "--concepts": "use --train_data_dir DIR:REPEATS ...",
    "--image_caching": "images are always cached; see cache/create_img_sdxl.py --help",
    "--text_caching": "captions are always cached; see cache/create_t5cache_768.py --help",
    "--learning_rate_scheduler": "use --scheduler",
    "--learning_rate_warmup_steps": "use --warmup_steps",
    "--learning_rate_cycles": "use --num_cycles",
    "--learning_rate_min_factor": "use --min_lr_rate",
    "--force_v_prediction": "use --objective v_prediction",
    **dict.fromkeys(["--loss_weight_fn", "--loss_weight_strength"], "use --use_snr, or --loss huber"),
    **dict.fromkeys(["--min_noising_strength", "--max_noising_strength"], "use --timestep_range"),
    "--timestep_distribution": "use --timestep_sampling",
    "--noising_weight": "use --logit_std with --timestep_sampling logit_normal",
    "--noising_bias": "use --logit_mean with --timestep_sampling logit_normal",
    "--masked_training": "cache the images with --mask files, then use --unmasked_weight",
    "--save_every": "use --save_steps, or --save_every_minutes",
    "--sample_after": "use --sample_every",
    "--lora_decompose": "use --dora",
    # kohya's sd-scripts.
    "--pretrained_model_name_or_path": "use --model, with a directory or model id of diffusers",
    "--train_batch_size": "use --batch_size",
    "--gradient_accumulation_steps": "use --gradient_accum",
    "--max_train_steps": "use --max_steps",
    "--max_train_epochs": "use --max_epochs",
    "--max_grad_norm": "use --gradient_clip",
    "--mixed_precision": "use --precision",
    "--full_bf16": "use --precision bf16_pure",
    "--full_fp16": "use --precision bf16_pure; weights are never float16",
    "--optimizer_type": "use --optimizer",
    "--optimizer_args": "use --betas and --weight_decay",
    "--use_8bit_adam": "use --optimizer adamw8",
    "--use_lion_optimizer": "use --optimizer lion",
    "--lr_scheduler_num_cycles": "use --num_cycles with --scheduler cosine; there are no restarts",
    "--lr_scheduler_min_lr_ratio": "use --min_lr_rate",
    "--min_snr_gamma": "use --use_snr --noise_gamma",
    "--debiased_estimation_loss": "use --use_snr debiased",
    "--loss_type": "use --loss",
    "--huber_schedule": "omit it; the constant of --loss huber falls exponentially with the timestep",
    **dict.fromkeys(["--discrete_flow_shift", "--training_shift"], "use --timestep_shift"),
    "--weighting_scheme": "use --timestep_sampling",
    "--noise_offset": "use --offset_noise",
    "--v_parameterization": "use --objective v_prediction",
    "--caption_dropout_rate": "use --cond_dropout",
    "--masked_loss": "cache the images with --mask files, then use --unmasked_weight",
    "--alpha_mask": "cache the images with --mask alpha, then use --unmasked_weight",
    "--random_crop": "cache the images with --crops N",
    "--flip_aug": "cache the images with --flip, then use --flip_p 0.5",
    "--save_every_n_steps": "use --save_steps",
    "--save_every_n_epochs": "use --save_on_epoch, or --save_steps in epochs like 2e",
    "--save_last_n_steps": "use --keep_last, a number of checkpoints",
    "--sample_every_n_steps": "use --sample_every",
    "--logging_dir": "use --logdir",
    "--max_data_loader_n_workers": "use --num_workers",
    "--dataset_config": "use --train_data_dir DIR:REPEATS",
    "--reg_data_dir": "there are no regularization images; add them as a further --train_data_dir",
    "--network_module": "use --lora_rank",
    "--network_dim": "use --lora_rank",
    "--network_alpha": "use --lora_alpha, whose default is the rank",
    "--network_dropout": "use --lora_dropout",
    "--train_text_encoder": "text encoders are never trained: captions are cached",
    "--cache_latents": "latents are always cached, by cache/create_img_sdxl.py or create_img_sdvae.py; omit it",
    "--xformers": "torch's fused attention is always used; omit it",
    "--sdpa": "torch's fused attention is always used; omit it",
    "--enable_bucket": "cache the images with --bucket",
    "--max_token_length": "CLIP reads 77 tokens; for longer captions, use T5",
    # EveryDream2.
    "--data_root": "use --train_data_dir",
    "--resume_ckpt": "use --model to start from a model, --resume to continue a run",
    "--project_name": "use --output_dir, whose last part is the name of the run",
    "--amp": "use --precision",
    "--useadam8bit": "use --optimizer adamw8",
    "--lowvram": "use --gradient_checkpointing and --precision bf16_pure",
    "--gpuid": "use --device cuda:N",
    "--disable_textenc_training": "text encoders are never trained; omit it",
    "--disable_xformers": "torch's fused attention is always used; omit it",
    "--ckpt_every_n_minutes": "use --save_every_minutes",
    "--save_ckpt_dir": "use --ckpt_dir",
    "--save_optimizer": "the optimizer's state is always saved; omit it",
    "--save_full_precision": "weights are saved as they are trained; omit it",
    "--zero_frequency_noise_ratio": "use --offset_noise",
    "--validation_config": "use --val_split or --val_data_dir",
    "--rated_dataset": "use REPEATS of a --train_data_dir, or multiply.txt in a folder",
    # Of both.
    "--resolution": _CACHED,
    "--clip_skip": "that is decided when the captions are cached: cache/create_clipl.py --clip_skip",
    **dict.fromkeys(
        ["--shuffle_caption", "--shuffle_tags"],
        "cache the captions with --shuffle_tags N; each visit then draws one of N orders",
    ),
    "--keep_tokens": "cache the captions with --shuffle_tags N --keep_tags K",
    "--caption_tag_dropout_rate": "cache the captions with --shuffle_tags N --drop_tags P",
    "--caption_separator": "cache the captions with --shuffle_tags N --tag_separator TEXT",
    "--caption_prefix": "cache the captions with --prefix",
    "--caption_suffix": "cache the captions with --suffix",
}


def optimizer(text: str) -> str:
    """An argparse type: the optimizer's name here.

    Raises:
        argparse.ArgumentTypeError: there is none like it here.
    """
    if text == "d_lion":
        raise argparse.ArgumentTypeError(
            "d_lion is not available; use prodigy, which finds the rate itself, with --lr 1"
        )
    return OPTIMIZER_SPELLINGS.get(text, text)
