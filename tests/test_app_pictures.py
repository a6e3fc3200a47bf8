"""Pictures from elsewhere: files made here as A1111, Forge, Fooocus, ComfyUI and InvokeAI do, and what is read."""

import json
from io import BytesIO

import pytest
from actions import Actions
from album import Album
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from png_settings import found_in
from settings import Settings, as_record
from studio import Studio

PROMPT = "a harbour at dawn, (three boats:1.3), mist\nsoft light, every colour muted"
NEGATIVE = "blurry, lowres, (bad hands:1.2)"
A1111 = (
    f"{PROMPT}\nNegative prompt: {NEGATIVE}\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 965400086, Size: 512x768, "
    "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, "
    'Lora hashes: "detail: 1234, light: 5678", Version: v1.10.1'
)
READ = {
    "prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": 28, "guidance_scale": 6.5, "seed": 965400086,
    "width": 512, "height": 768, "weighting": "a1111",
}  # fmt: skip


def png(**chunks: str) -> bytes:
    info, content = PngInfo(), BytesIO()
    for key, value in chunks.items():
        info.add_text(key.replace("__", "-"), value)
    Image.new("RGB", (8, 8)).save(content, "PNG", pnginfo=info)
    return content.getvalue()


def exif(kind: str, comment: bytes = b"", **texts: str) -> bytes:
    """A JPEG or WebP with EXIF's UserComment, and texts in its first block."""
    data, content = Image.Exif(), BytesIO()
    if comment:
        data[0x8769] = {0x9286: comment}
    for tag, value in texts.items():
        data[int(tag[1:], 16)] = value
    Image.new("RGB", (8, 8)).save(content, kind, exif=data)
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        png(parameters=A1111),
        exif("JPEG", b"UNICODE\0" + A1111.encode("utf-16-be")),  # as A1111 and Forge write it
        exif("WEBP", b"UNICODE\0" + A1111.encode("utf-16-be")),
        exif("JPEG", b"UNICODE\0" + A1111.encode("utf-16-le")),
        exif("WEBP", b"UNICODE\0" + A1111.encode("utf-16")),
        exif("JPEG", b"ASCII\0\0\0" + A1111.encode()),
    ],
    ids=["png", "jpeg", "webp", "jpeg little", "webp mark", "jpeg ascii"],
)
def test_a1111_in_every_kind_of_file(content):
    found, model = found_in(content)
    assert (found.program, dict(found.values), model) == ("A1111 or Forge", READ, None)
    unread = ("sampler DPM++ 2M", "schedule type Karras", "model v1-5-pruned-emaonly", "clip skip 2")
    assert found.unread == unread
    Settings(**found.values)


def test_forge_with_loras_without_a_negative_prompt_and_in_another_script():
    text = (
        "夜明けの港、<lora:detail tweaker:0.8> 三隻の舟 [mist]\n"
        "Steps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, "
        "Seed: 4294967295, Size: 896x1152, Model: flux1-dev, "
        "Denoising strength: 0.4, Hires upscale: 1.5, Version: f2.0.1v1.10.1-previous"
    )
    (found, _), (jpeg, _) = (
        found_in(png(parameters=text)),
        found_in(exif("JPEG", b"UNICODE\0" + text.encode("utf-16-be"))),
    )
    assert found == jpeg
    assert found.values["prompt"] == "夜明けの港、 三隻の舟 [mist]"
    assert (found.values["seed"], found.values["negative_prompt"], found.values["width"]) == (2**32 - 1, "", 896)
    for words in ("LoRA detail tweaker", "denoising strength 0.4", "hires upscale 1.5"):
        assert words in found.unread


def ksampler(**inputs) -> dict:
    graph = {
        "3": {"class_type": "KSampler", "inputs": {
            "seed": 156680208, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]} | inputs},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a galaxy bottle, nebula glass", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    }  # fmt: skip
    return graph


COMFY = {
    "prompt": "a galaxy bottle, nebula glass", "negative_prompt": "text, watermark", "seed": 156680208, "steps": 20,
    "guidance_scale": 8.0, "width": 512, "height": 640, "weighting": "plain",
}  # fmt: skip


def test_comfyui_in_png_and_webp():
    text = json.dumps(ksampler())
    workflow = json.dumps({"nodes": [], "links": [], "version": 0.4})
    for content in (png(prompt=text, workflow=workflow), png(prompt=text),
                    exif("WEBP", x0110=f"prompt:{text}", x010F=f"workflow:{workflow}")):  # fmt: skip
        found, _ = found_in(content)
        assert (found.program, dict(found.values)) == ("ComfyUI", COMFY)
        assert found.unread == ("sampler euler", "scheduler normal", "model v1-5-pruned-emaonly.safetensors")


def test_comfyui_follows_links_to_texts_numbers_and_sizes():
    graph = ksampler(seed=["20", 0], steps=["21", 0], positive=["30", 0], negative=["30", 1])
    graph |= {
        "20": {"class_type": "PrimitiveInt", "inputs": {"value": 7}},
        "21": {"class_type": "Reroute", "inputs": {"value": ["22", 0]}},
        "22": {"class_type": "PrimitiveInt", "inputs": {"value": 31}},
        "23": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a bottle on a shelf"}},
        # A ControlNet passes both prompts on, by two outputs; the control's own image leads nowhere.
        "30": {"class_type": "ControlNetApplyAdvanced", "inputs": {
            "positive": ["6", 0], "negative": ["7", 0], "control_net": ["31", 0], "image": ["32", 0], "strength": 1}},
        "31": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "canny.safetensors"}},
        "32": {"class_type": "LoadImage", "inputs": {"image": "not a prompt.png", "text": "nor this"}},
        "40": {"class_type": "LoraLoader", "inputs": {"lora_name": "ink.safetensors", "strength_model": 0.7}},
    }  # fmt: skip
    graph["6"]["inputs"]["text"] = ["23", 0]
    found, _ = found_in(png(prompt=json.dumps(graph)))
    assert dict(found.values) == COMFY | {"prompt": "a bottle on a shelf", "seed": 7, "steps": 31}
    assert {"ControlNet canny.safetensors", "LoRA ink.safetensors"} <= set(found.unread)


def test_comfyui_s_sampler_of_parts_and_a_second_pass():
    graph = {
        "1": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["2", 0], "guider": ["3", 0], "sampler": ["9", 0], "sigmas": ["4", 0], "latent_image": ["5", 0]}},
        "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 12}},
        "3": {"class_type": "CFGGuider", "inputs": {"cfg": 3.5, "positive": ["6", 0], "negative": ["8", 0]}},
        "4": {"class_type": "BasicScheduler", "inputs": {"steps": 25, "scheduler": "simple", "denoise": 1.0}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
        "6": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["7", 0]}},
        "7": {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_g": "a bottle", "text_l": "a bottle"}},
        "8": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["7", 0]}},
        "9": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    }  # fmt: skip
    found, _ = found_in(png(prompt=json.dumps(graph)))
    assert dict(found.values) == {
        "prompt": "a bottle", "negative_prompt": "", "seed": 12, "steps": 25, "guidance_scale": 3.5, "width": 1024,
        "height": 768, "weighting": "plain",
    }  # fmt: skip
    second = {"a": ksampler(seed=99, latent_image=["3", 0], denoise=0.5)["3"], **ksampler()}  # it stands first
    assert dict(found_in(png(prompt=json.dumps(second)))[0].values) == COMFY


def test_invokeai():
    data = {
        "generation_mode": "sdxl_txt2img", "positive_prompt": "a (bottle)1.2 of stars++", "negative_prompt": "blurry",
        "width": 1024, "height": 1152, "seed": 1234567, "cfg_scale": 7.5, "steps": 30, "scheduler": "euler",
        "model": {"key": "b1", "hash": "blake3:0", "name": "Juggernaut XL v9", "base": "sdxl", "type": "main"},
        "loras": [{"model": {"name": "Ink"}, "weight": 0.75}], "app_version": "6.0.0",
    }  # fmt: skip
    found, _ = found_in(png(invokeai_metadata=json.dumps(data)))
    assert dict(found.values) == {
        "prompt": "a (bottle)1.2 of stars++", "negative_prompt": "blurry", "seed": 1234567, "steps": 30,
        "guidance_scale": 7.5, "width": 1024, "height": 1152, "weighting": "compel",
    }  # fmt: skip
    assert found.unread == ("scheduler euler", "model Juggernaut XL v9", "LoRA Ink")


def test_invokeai_before_version_3():
    image = {"prompt": [{"prompt": "a bottle of stars [blurry]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5,
             "seed": 5, "width": 512, "height": 640, "sampler": "k_lms"}  # fmt: skip
    second = png(**{"sd-metadata": json.dumps({"model_weights": "stable-diffusion-1.5", "image": image})})
    first = png(Dream='"a bottle of stars [blurry]" -s 50 -S 5 -W 512 -H 640 -C 7.5 -A k_lms')
    for content, unread in ((second, ("sampler k_lms", "model stable-diffusion-1.5")), (first, ("sampler k_lms",))):
        found, _ = found_in(content)
        assert (found.program, found.unread) == ("InvokeAI", unread)
        assert dict(found.values) == {
            "prompt": "a bottle of stars", "negative_prompt": "blurry", "seed": 5, "steps": 50, "guidance_scale": 7.5,
            "width": 512, "height": 640, "weighting": "plain",
        }  # fmt: skip


def test_fooocus_in_png_and_jpeg():
    data = {
        "prompt": "a (bottle:1.2) of stars", "negative_prompt": "blurry", "styles": "['Fooocus V2']", "steps": 30,
        "performance": "Speed", "resolution": "(1152, 896)", "guidance_scale": 4, "sharpness": 2, "clip_skip": 2,
        "base_model": "juggernautXL_v8", "base_model_hash": "aeb7e9e689", "refiner_model": "None", "seed": "1234567",
        "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras", "loras": [["offset", 0.1, "4852686128"]],
        "metadata_scheme": "fooocus", "version": "Fooocus v2.5.5",
    }  # fmt: skip
    text = json.dumps(data)
    for content in (png(parameters=text), exif("JPEG", b"UNICODE\0" + text.encode("utf-16-be"))):
        found, _ = found_in(content)
        assert found.program == "Fooocus"
        assert dict(found.values) == {
            "prompt": "a (bottle:1.2) of stars", "negative_prompt": "blurry", "seed": 1234567, "steps": 30,
            "guidance_scale": 4, "width": 1152, "height": 896, "weighting": "a1111",
        }  # fmt: skip
        assert {"sampler dpmpp_2m_sde_gpu", "model juggernautXL_v8", "LoRA offset"} <= set(found.unread)


def test_what_the_page_cannot_take_is_left_out_and_said():
    found, _ = found_in(png(prompt=json.dumps(ksampler(seed=2**60, steps=400, cfg=["missing", 0]))))
    assert not {"seed", "steps", "guidance_scale"} & found.values.keys()
    assert any("Seed cannot be 1152921504606846976" in words for words in found.unread)
    assert any("Steps cannot be 400" in words for words in found.unread)
    graph = ksampler()
    graph["6"] = {"class_type": "WildcardEncode", "inputs": {"template": "__animal__"}}
    found, _ = found_in(png(prompt=json.dumps(graph)))
    assert "prompt" not in found.values
    assert {"the prompt", "the text of WildcardEncode"} <= set(found.unread)


LOOP = json.dumps(ksampler() | {"6": {"class_type": "A", "inputs": {"conditioning": ["6", 0]}}})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (exif("JPEG"), "holds no settings: drop one of this page, or of A1111"),
        (exif("WEBP", b"UNICODE\0" + b"\xd8"), "A1111 or Forge wrote in this picture cannot be read"),
        (png(parameters=""), "A1111 or Forge wrote in this picture cannot be read"),
        (png(parameters="Steps: many, Seed: 3"), "cannot be read"),
        (png(prompt="a text"), "ComfyUI wrote in this picture cannot be read"),
        (png(prompt="[" * 100_000), "ComfyUI wrote in this picture cannot be read"),
        (png(prompt="{}"), "ComfyUI wrote in this picture cannot be read"),
        (png(prompt='{"1": 2}'), "ComfyUI wrote in this picture cannot be read"),
        (png(parameters="{}"), "Fooocus wrote in this picture cannot be read"),
        (png(parameters='{"a": ' * 50_000), "Fooocus wrote in this picture cannot be read"),
        (png(**{"sd-metadata": '{"image": 3}'}), "InvokeAI wrote in this picture cannot be read"),
        (png(Dream='"never ends'), "InvokeAI wrote in this picture cannot be read"),
        (png(invokeai_metadata="[]"), "InvokeAI wrote in this picture cannot be read"),
        (exif("JPEG")[:30], "is not a picture that can be read"),
    ],
    ids=range(14),
)
def test_a_picture_of_another_program_that_is_hostile_is_one_sentence(content, words):
    with pytest.raises(ValueError) as caught:
        found_in(content)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_that_runs_in_circles_ends():
    found, _ = found_in(png(prompt=LOOP))
    assert "prompt" not in found.values
    ring = ksampler(seed=["a", 0])
    ring |= {"a": {"inputs": {"value": ["b", 0]}}, "b": {"inputs": {"value": ["a", 0]}}}
    assert "seed" not in found_in(png(prompt=json.dumps(ring)))[0].values


@pytest.mark.parametrize("scenes", [True, False])
def test_the_page_fills_what_was_read_and_says_the_rest(tmp_path, scenes):
    actions = Actions(Studio(lambda: None, scenes), Album(tmp_path, "m"), None, as_record(Settings("x")))
    told, keep_seed, *controls = actions.restore(png(parameters=A1111))
    filled = dict(zip(actions.start, controls, strict=True))
    assert keep_seed is True
    assert (filled["prompt"], filled["steps"], filled["seed"]) == (PROMPT, 28, 965400086)
    assert (filled["width"], filled["height"]) == ((None, None) if scenes else (512, 768))
    assert "Read from A1111 or Forge: prompt, negative prompt, seed, steps, guidance" in told
    assert ("width 512" in told.split("Not read:")[1]) == scenes
    assert "sampler DPM++ 2M" in told
    told, keep_seed, *controls = actions.restore(exif("JPEG"))
    assert "holds no settings" in told
    assert all(isinstance(item, dict) for item in (keep_seed, *controls))  # gradio's word for: as it was
