"""A web page for long prompts: what each encoder reads, what is drawn, and which sentence made which part.

    python app/app.py                                              # the bundled model, on http://127.0.0.1:7860
    python app/app.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --finelip longclip-l14

docs/app.md describes the page and how to use it from code or as a Space.
"""

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio asks for it when it is imported
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # it makes a table of them after each
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import example
import gradio as gr
import panels
import results
from actions import Actions
from album import Album
from api import Api
from example_prompts import PICTURES, SCENES
from scene_reader import Reader
from settings import BOUNDS, Settings, as_record
from studio import MAX_WAITING, Studio

GUIDANCE_SCALES = {True: 3.0, False: 7.5}  # by whether the model draws scenes
MAX_THREADS = 120  # one for each request in line, and some for those who type
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp"]

# What the browser does by itself: page.js has the functions.
REMEMBER = "(state, ...values) => page.remember(state, values)"
BEGIN = "() => page.begin('%s')"
END = "() => page.end()"
ENTER = "state => [state, location.hash]"
GO_ON = "() => page.goOn()"
COPY_LINK = f"(...values) => page.copyLink({[item.name for item in fields(Settings)]}, values)"
CLICKED_SENTENCE = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-sentence]');
  if (button) trigger('select', { sentence: Number(button.dataset.sentence) });
});
"""
CLICKED_HISTORY = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-use]');
  if (button) trigger('select', { name: button.dataset.use });
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
    files = {
        kind: Path(__file__).with_name(name).read_text() for kind, name in (("css", "style.css"), ("js", "page.js"))
    }
    head = f"<script>{files['js']}</script>"
    # A thread for each request that waits in line, and some for those who type.
    return {"theme": theme, "css": files["css"], "head": head, "footer_links": [], "max_threads": MAX_THREADS}


def build_demo(
    pipeline: Any, *, name: str = "bundled", scenes: bool = True, max_queue: int = MAX_WAITING
) -> gr.Blocks:
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
    studio, reader = Studio(load, scenes, max_queue), Reader() if scenes else None
    examples = SCENES if scenes else PICTURES
    start = {
        "guidance_scale": GUIDANCE_SCALES[scenes],
        "prompt": example.PROMPT if scenes else next(iter(PICTURES.values())),
    }
    first = as_record(Settings(**start))
    # What people drop is deleted after a day, looked after every hour; the album sees to its own files.
    with gr.Blocks(title="Long prompts, seen", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        album = Album(Path(demo.GRADIO_CACHE) / "finelip-pictures", name)
        actions, api = Actions(studio, album, reader, first), Api(studio, album)
        state = gr.BrowserState({}, storage_key="finelip-page", secret="finelip-page")
        fragment = gr.Textbox(visible=False)
        gr.HTML(
            "<h1>Long prompts, seen</h1><p class='lead'>Stable Diffusion reads 77 tokens of a prompt and drops "
            f"the rest. FineLIP reads 248. Model: <code>{escape(name)}</code></p>"
        )
        with gr.Row(elem_id="layout"):
            with gr.Column(elem_id="ask", min_width=0):
                prompt = gr.Textbox(
                    first["prompt"], label="Prompt", lines=8, max_lines=16, elem_id="prompt",
                    placeholder="What should the picture show?",
                )  # fmt: skip
                meter = gr.HTML(panels.note("The model is being loaded."), elem_id="meter")
                advice = gr.HTML(reader.advice("") if reader else "", elem_id="advice", visible=scenes)
                with gr.Row(elem_id="buttons"):
                    compare = gr.Button("Compare", variant="primary", elem_id="compare", min_width=0)
                    draw = gr.Button("Draw one", elem_id="draw", min_width=0)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=0, visible=False)
                told = gr.HTML(panels.HINT, elem_id="told")
            with gr.Column(elem_id="results", min_width=0), gr.Tabs(elem_id="tabs"):
                with gr.Tab("Pictures", id="pictures"):
                    shown = gr.HTML(example.shown(reader) if reader else results.empty(), elem_id="shown")
                with gr.Tab("Listen", id="listen"):
                    gr.HTML("<p class='lead'>Click a sentence: the picture stays colored where it was heard.</p>")
                    which = gr.Radio([], label="Picture", elem_id="which")
                    with gr.Row(elem_id="listening"):
                        heard = gr.HTML(elem_id="heard")
                        sentences = gr.HTML(
                            panels.note("Draw or compare first."), js_on_load=CLICKED_SENTENCE, elem_id="sentences"
                        )
                with gr.Tab("History", id="history"):
                    history = gr.HTML(results.history([], reader), js_on_load=CLICKED_HISTORY, elem_id="kept")
            with gr.Column(elem_id="more", min_width=0):
                tries = gr.Dataset(
                    components=[prompt], samples=[[text] for text in examples.values()], type="index",
                    label="Examples", sample_labels=list(examples), elem_id="examples",
                )  # fmt: skip
                with gr.Row(elem_id="carry"):
                    file = gr.UploadButton(
                        "Open a picture", type="binary", file_types=FILE_TYPES, size="sm", elem_id="file", min_width=0
                    )
                    link = gr.Button("Copy a link", size="sm", elem_id="link", min_width=0)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    negative = gr.Textbox(label="Negative prompt", lines=2, elem_id="negative")
                    negative_meter = gr.HTML(elem_id="negative-meter")
                    strategy = gr.Dropdown(
                        [(text, value) for value, text in panels.STRATEGIES.items()], value="stretch",
                        label="Draw one reads the prompt with", elem_id="strategy",
                    )  # fmt: skip
                    weighting = gr.Dropdown(
                        [(text, value) for value, text in panels.WEIGHTINGS.items()], value="plain",
                        label="Brackets in the prompt are", elem_id="weighting",
                    )  # fmt: skip
                    bounds = {key: {"minimum": least, "maximum": most} for key, (least, most, _) in BOUNDS.items()}
                    with gr.Row():
                        steps = gr.Slider(
                            **bounds["steps"], value=first["steps"], step=1, label="Steps", elem_id="steps",
                            buttons=[], min_width=140,
                        )  # fmt: skip
                        guidance = gr.Slider(
                            **bounds["guidance_scale"], value=first["guidance_scale"], step=0.5, label="Guidance",
                            elem_id="guidance", buttons=[], min_width=140,
                        )  # fmt: skip
                    with gr.Row():
                        seed = gr.Number(first["seed"], label="Seed", precision=0, elem_id="seed", min_width=140)
                        number = gr.Slider(
                            **bounds["num_images"], value=1, step=1, label="Pictures of Draw", elem_id="number",
                            buttons=[], min_width=140,
                        )  # fmt: skip
                    keep_seed = gr.Checkbox(True, label="Keep this seed", elem_id="keep-seed")
                    with gr.Row(visible=not scenes):
                        sizes = [
                            gr.Number(
                                None, label=f"{side.capitalize()} in pixels (empty: the model's)", precision=0,
                                elem_id=side, min_width=140,
                            )
                            for side in ("width", "height")
                        ]  # fmt: skip

        # First, because gradio numbers the names of later events that are called the same.
        gr.api(api.describe, api_name="describe", queue=False)
        for call in (api.draw, api.compare):
            gr.api(call, api_name=call.__name__, concurrency_limit=None)
        gr.api(api.listen, api_name="listen", queue=False)

        page: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        at_once: dict[str, Any] = {"queue": False, **page}
        # All of `Settings`, in its order.
        values: list[Any] = [prompt, negative, steps, guidance, seed, number, strategy, weighting, *sizes]
        controls = [keep_seed, *values]

        typed: Any = {
            "fn": actions.meter,
            "inputs": [prompt, negative, weighting],
            "outputs": [meter, advice, negative_meter],
        }
        gr.on([prompt.change, negative.change, weighting.change], trigger_mode="always_last", **typed, **at_once)
        gr.on(
            [item.change for item in controls],
            None,
            [state, *controls],
            state,
            js=REMEMBER,
            trigger_mode="always_last",
            **at_once,
        )

        listening = [which, sentences]
        for button, drawing, kind in ((compare, actions.compare, "compare"), (draw, actions.draw, "draw")):
            begun = button.click(None, js=BEGIN % kind, trigger_mode="multiple", **at_once)
            begun = begun.then(actions.begin, None, [told, stop], trigger_mode="multiple", **at_once)
            drawn = begun.then(
                drawing, [state, *controls], [told, shown, history, seed, *listening, stop],
                concurrency_limit=None, trigger_mode="multiple", **page,
            )  # fmt: skip
            drawn.then(None, js=END, trigger_mode="multiple", **at_once)
        # Without gradio's `cancels`: a step that comes after it would stay in its frame for good.
        stop.click(actions.stop, **at_once)

        which.input(actions.choose, which, [sentences, heard], **at_once)
        sentences.select(actions.hear, which, [sentences, heard], **at_once)
        filled = [told, *controls]
        history.select(actions.open, state, filled, **at_once)
        file.upload(actions.restore, file, filled, **at_once)
        tries.click(lambda index: list(examples.values())[index], tries, prompt, **at_once)
        link.click(None, values, told, js=COPY_LINK, **at_once)
        demo.load(
            actions.enter, [state, fragment], [state, told, shown, history, *listening, *controls], js=ENTER, **at_once
        ).then(None, js=GO_ON, **at_once).then(**typed, **at_once)
        demo.unload(actions.leave)
    return demo.queue(api_open=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        help="The folder or hub id of a Stable Diffusion 1.x, 2.x or XL model. The default is the bundled model.",
    )
    parser.add_argument("--finelip", help="The long text encoder: a folder, a hub id or a checkpoint file.")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="The data type of the weights. The default is float32.",
    )
    parser.add_argument(
        "--device",
        help="The device, such as cpu, cuda or mps. The default is cuda if it is available, and cpu otherwise.",
    )
    parser.add_argument(
        "--host",
        help="The address to listen on. 0.0.0.0 lets other machines connect. The default is "
        "$GRADIO_SERVER_NAME, or else 127.0.0.1.",
    )
    parser.add_argument(
        "--port",
        type=int,
        help="The port to listen on. The default is $GRADIO_SERVER_PORT, or else the first free port from 7860.",
    )
    parser.add_argument(
        "--share", action="store_true", help="Whether to create a public link through gradio's servers."
    )
    parser.add_argument(
        "--max_queue",
        type=int,
        default=MAX_WAITING,
        help=f"The maximum number of waiting requests. The default is {MAX_WAITING}.",
    )
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
