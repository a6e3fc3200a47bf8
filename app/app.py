"""A page for long prompts: what each encoder reads of one, what is drawn of it, and which sentence made what.

    python app/app.py                                              # the bundled model, on http://127.0.0.1:7860
    python app/app.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --finelip longclip-l14

docs/app.md shows it, and how to use it from code or as a Space.
"""

import argparse
import logging
import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio asks for it when it is imported
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # it makes a table of them after each
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import example_prompts
import gradio as gr
import panels
from actions import Actions
from studio import BOUNDS, Studio

MAX_QUEUE = 40  # requests that wait at once
MODEL = "model"  # the queue in which everybody waits for the pipeline
BUTTONS: Any = ["download", "fullscreen"]  # of a picture; gradio's own set has one that publishes it
GUIDANCE_SCALES = {True: 3.0, False: 7.5}  # by whether the model draws scenes

SHORTCUT = """
<script>
document.addEventListener('keydown', event => {
  if ((event.ctrlKey || event.metaKey) && event.key === 'Enter') {
    event.preventDefault();
    document.querySelector('#draw').click();
  }
});
</script>
"""
TO_STAGE = """
() => {
  const stage = document.querySelector('#stage'), { top } = stage.getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) stage.scrollIntoView({ behavior: 'smooth' });
  return [];
}
"""
CLICKED_SENTENCE = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-sentence]');
  if (button) trigger('select', { sentence: Number(button.dataset.sentence) });
});
"""


def look() -> dict[str, Any]:
    """How the page looks: arguments for `launch`. System fonts, so that nothing is fetched from elsewhere."""
    sans, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=sans, font_mono=mono).set(
        body_text_color_subdued="*neutral_600",
        block_title_text_color="*neutral_700",
        block_label_text_color="*neutral_700",
        block_info_text_color="*neutral_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        color_accent="*primary_700",
        slider_color="*primary_700",
        checkbox_background_color_selected="*primary_700",
    )
    return {"theme": theme, "css": Path(__file__).with_name("style.css").read_text(), "head": SHORTCUT}


def build_demo(pipeline: Any, *, name: str = "bundled", scenes: bool = True, max_queue: int = MAX_QUEUE) -> gr.Blocks:
    """Builds the page; `launch(**look())` opens it.

    Args:
        pipeline: A pipeline of this package, or a function that loads one; it is called when the first page opens.
        name: The model's name, which the page shows and the PNGs hold.
        scenes: Whether the model draws the bundled world: one size, a reader, and examples of its own.
        max_queue: Requests that may wait; further ones are told to come back.

    Returns:
        The page.
    """
    load: Callable[[], Any] = pipeline if not hasattr(pipeline, "describe_prompt") else lambda: pipeline
    studio = Studio(load, scenes)
    bounds: dict[str, Any] = {name: {"minimum": least, "maximum": most} for name, (least, most, _) in BOUNDS.items()}
    # Files of pictures older than a day are deleted, looked after every hour.
    with gr.Blocks(title="Long prompts, seen", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        actions = Actions(studio, name, demo.GRADIO_CACHE)
        gr.HTML(
            "<h1>Long prompts, seen</h1><p class='lead'>Stable Diffusion reads 77 tokens of a prompt and drops "
            f"the rest. FineLIP reads 248. Model: <code>{escape(name)}</code></p>"
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    label="Prompt", lines=7, max_lines=18, elem_id="prompt", placeholder="What shall it show?"
                )
                meter = gr.HTML(panels.note("The model is being loaded."), elem_id="meter")
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                    compare = gr.Button("Compare", elem_id="compare", min_width=80)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
                gr.HTML("<p class='hint'>Ctrl + Enter draws. Compare draws three times, from the same noise.</p>")
                reading = gr.HTML(elem_id="reading")
                examples = example_prompts.SCENES if scenes else example_prompts.PICTURES
                tries = gr.Dataset(
                    components=[prompt], samples=[[text] for text in examples.values()], type="index",
                    label="Examples", sample_labels=list(examples), elem_id="examples",
                )  # fmt: skip
                negative = gr.Textbox(label="Negative prompt", lines=2, elem_id="negative")
                negative_meter = gr.HTML(elem_id="negative-meter")
                with gr.Accordion("Settings", open=True):
                    strategy = gr.Dropdown(
                        [(text, value) for value, text in panels.STRATEGIES.items()], value="stretch",
                        label="How the prompt is read", elem_id="strategy",
                    )  # fmt: skip
                    weighting = gr.Dropdown(
                        [(text, value) for value, text in panels.WEIGHTINGS.items()], value="plain",
                        label="Brackets in prompts are", elem_id="weighting",
                    )  # fmt: skip
                    with gr.Row():
                        steps = gr.Slider(**bounds["steps"], value=20, step=1, label="Steps", elem_id="steps")
                        guidance = gr.Slider(
                            **bounds["guidance_scale"], value=GUIDANCE_SCALES[scenes], step=0.5, label="Guidance",
                            elem_id="guidance",
                        )  # fmt: skip
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                        number = gr.Slider(**bounds["num_images"], value=1, step=1, label="Pictures", elem_id="number")
                    keep_seed = gr.Checkbox(True, label="Keep this seed", elem_id="keep-seed")
                    with gr.Row(visible=not scenes):
                        width = gr.Number(
                            None, label="Width in pixels (empty: the model's)", precision=0, elem_id="width"
                        )
                        height = gr.Number(
                            None, label="Height in pixels (empty: the model's)", precision=0, elem_id="height"
                        )
            with gr.Column(
                scale=6, min_width=320, elem_classes=["results", "small-pictures"] if scenes else ["results"]
            ):
                nothing = panels.note("Nothing drawn yet: write a prompt, or take an example.")
                stage = gr.HTML(nothing, elem_id="stage")
                with gr.Tabs(elem_id="tabs") as tabs:
                    with gr.Tab("Drawn", id="drawn"):
                        drawn = gr.Gallery(
                            label="Drawn", format="png", preview=True, height=520, elem_id="drawn", buttons=BUTTONS,
                            object_fit="contain", interactive=False,
                        )  # fmt: skip
                    with gr.Tab("Compared", id="compared"):
                        with gr.Row(elem_classes="labelled"):
                            compared = [
                                gr.Image(
                                    label=label, type="filepath", format="png", interactive=False, min_width=90,
                                    elem_id=f"compared-{value}", buttons=BUTTONS, alt_text=f"Drawn under {label}",
                                )
                                for value, label in panels.COMPARED.items()
                            ]  # fmt: skip
                        verdict = gr.HTML(elem_id="verdict")
                    with gr.Tab("Listen", id="listen"):
                        gr.HTML("<p class='lead'>Click a sentence: the picture stays coloured where it was heard.</p>")
                        which = gr.Radio([], label="Picture", elem_id="which")
                        with gr.Row():
                            with gr.Column(min_width=260, elem_id="ear"):
                                heat = gr.Image(
                                    label="Where the sentence was heard", interactive=False, elem_id="heat",
                                    buttons=BUTTONS, elem_classes="labelled",
                                )  # fmt: skip
                                heard = gr.HTML(elem_id="heard")
                            with gr.Column(min_width=260):
                                sentences = gr.HTML(
                                    panels.note("Draw or compare first."), js_on_load=CLICKED_SENTENCE,
                                    elem_id="sentences",
                                )  # fmt: skip
                    with gr.Tab("Kept", id="kept"):
                        kept = gr.Gallery(
                            label="Pictures of this visit", format="png", columns=4, height="auto", elem_id="kept",
                            buttons=BUTTONS, object_fit="contain", interactive=False,
                        )  # fmt: skip
                        file = gr.File(
                            label="Drop a saved PNG here to bring its prompt and settings back", type="binary",
                            file_types=[".png"], height=180, elem_id="file",
                        )  # fmt: skip
                        restored = gr.HTML(elem_id="restored")

        # First, because gradio numbers the names of later events that are called the same.
        gr.api(actions.api_describe, api_name="describe", queue=False)
        for call, api_name in ((actions.api_draw, "draw"), (actions.api_compare, "compare")):
            gr.api(call, api_name=api_name, concurrency_id=MODEL, concurrency_limit=1)
        gr.api(actions.api_listen, api_name="listen", queue=False)

        page: dict[str, Any] = {"api_visibility": "private"}
        # All of `Settings`, in its order.
        values = [prompt, negative, steps, guidance, seed, number, strategy, weighting, width, height]
        measured = {
            "fn": actions.meter, "inputs": [prompt, negative, weighting], "outputs": [meter, reading, negative_meter],
            "queue": False, "show_progress": "hidden", **page,
        }  # fmt: skip
        waiting: dict[str, Any] = {
            "concurrency_id": MODEL, "concurrency_limit": 1, "show_progress": "minimal", "show_progress_on": stage,
            "preprocess": False, **page,
        }  # fmt: skip
        listening = [which, sentences]
        gr.on([prompt.change, negative.change, weighting.change], trigger_mode="always_last", **measured)
        tries.click(lambda index: list(examples.values())[index], tries, prompt, queue=False, **page)
        draw.click(actions.to_drawn, None, [tabs, stage], queue=False, js=TO_STAGE, **page).then(
            actions.draw, [keep_seed, *values], [stage, drawn, kept, seed, *listening], **waiting
        )
        compare.click(actions.to_compared, None, [tabs, stage], queue=False, js=TO_STAGE, **page).then(
            actions.compare, [keep_seed, *values], [stage, *compared, verdict, kept, seed, *listening], **waiting
        )
        # Without gradio's `cancels`: a step that comes after it would stay on the stage for good.
        stop.click(actions.stop, queue=False, **page)
        which.input(actions.choose, which, [sentences, heat, heard], queue=False, show_progress="hidden", **page)
        sentences.select(actions.hear, which, [sentences, heat, heard], queue=False, show_progress="hidden", **page)
        file.upload(actions.restore, file, [keep_seed, *values, restored], queue=False, show_progress="hidden", **page)
        demo.load(**measured)
        demo.unload(actions.leave)
    return demo.queue(max_size=max_queue, api_open=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a Stable Diffusion 1.x, 2.x or XL (default: bundled)")
    parser.add_argument("--finelip", help="a long text encoder: folder, hub id or checkpoint file")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one)")
    parser.add_argument("--host", help="0.0.0.0 lets other machines in (default: $GRADIO_SERVER_NAME, else 127.0.0.1)")
    parser.add_argument("--port", type=int, help="(default: $GRADIO_SERVER_PORT, else the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="a public link through gradio's servers")
    parser.add_argument("--max_queue", type=int, default=MAX_QUEUE, help="requests that may wait")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("finelip_diffusion.prompt_encoder").setLevel(logging.ERROR)  # the page says what is dropped

    def load() -> Any:
        from finelip_diffusion.cli import load_pipeline

        return load_pipeline(args.model, args.finelip, long_prompt="stretch", dtype=args.dtype, device=args.device)

    demo = build_demo(load, name=args.model or "bundled", scenes=args.model is None, max_queue=args.max_queue)
    demo.launch(server_name=args.host, server_port=args.port, share=args.share, max_file_size="20mb", **look())


if __name__ == "__main__":
    main()
