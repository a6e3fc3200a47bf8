"""A vision-language model of Qwen3-VL's own classes at a tiny size: random weights, a tokenizer of letters and
answers, saved as a folder that `AutoModelForImageTextToText` and `AutoProcessor` load."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
ANSWERS = ("Yes", "yes", " Yes", " yes", "No", "no", " No", " no", "one", "One", " one", "1", "two", " two", "2")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(words: tuple[str, ...] = ANSWERS) -> PreTrainedTokenizerFast:
    """Letters, and the words of answers as tokens of their own."""
    letters = [chr(code) for code in range(32, 127)] + ["\n", "\ufffd"]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys([*SPECIAL, *letters, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="\ufffd"))
    longest = "|".join(sorted((word for word in words if len(word) > 1), key=len, reverse=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{longest}|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[2], unk_token="\ufffd",
        additional_special_tokens=[token for token in SPECIAL if token not in (SPECIAL[0], SPECIAL[2])],
    )  # fmt: skip


def save_vision_model(folder: Path, seed: int = 0, words: tuple[str, ...] = ANSWERS) -> Path:
    """Writes model and processor."""
    tokenizer = tiny_tokenizer(words)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "max_position_embeddings": 4096,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # answers that differ visibly from question to question
    model.save_pretrained(folder)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    options = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**options), tokenizer, Qwen3VLVideoProcessor(**options), chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder
