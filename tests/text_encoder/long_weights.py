"""Random weights under OpenAI's names, and the long text tower as its authors describe it."""

import torch

SHORT = "a red fox"
LONG = " ".join(f"in cell {n} a small blue square, then a green ring;" for n in range(30))
START, END = 49406, 49407


def random_state(width=64, layers=2, rows=248, two_tables=True, projection=32, dtype=torch.float32):
    """Weights under OpenAI's names, of the sizes of OpenAI's initialization, biases included."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, std):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    attention, output, mlp = width**-0.5, width**-0.5 * (2 * layers) ** -0.5, (2 * width) ** -0.5
    state = {
        "token_embedding.weight": random(49408, width, std=0.02),
        "positional_embedding": random(rows, width, std=0.01),
        "ln_final.weight": 1 + random(width, std=0.1),
        "ln_final.bias": random(width, std=0.1),
        "text_projection": random(width, projection, std=attention),
        "logit_scale": torch.tensor(4.6),
        "visual.proj": torch.zeros(2, 2),
    }
    if two_tables:
        state["positional_embedding_res"] = random(rows, width, std=0.01)
        state["cross_net.visual.weight"] = torch.zeros(2, 2)
    for n in range(layers):
        block = f"transformer.resblocks.{n}."
        for name, (rows_, columns, std) in {
            "attn.in_proj_": (3 * width, width, attention),
            "attn.out_proj.": (width, width, output),
            "mlp.c_fc.": (4 * width, width, mlp),
            "mlp.c_proj.": (width, 4 * width, output),
        }.items():
            state[f"{block}{name}weight"] = random(rows_, columns, std=std)
            state[f"{block}{name}bias"] = random(rows_, std=0.02)
        for name in ("ln_1", "ln_2"):
            state[f"{block}{name}.weight"] = 1 + random(width, std=0.1)
            state[f"{block}{name}.bias"] = random(width, std=0.1)
    return state


def norm(x, state, name):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def two_table_forward(state, input_ids, keep=20):
    """The long text tower as its authors describe it: two masked tables, then CLIP's pre-norm transformer.

    Returns the states after `ln_final`, and the pooled embedding: the state at the end-of-text token, projected.
    """
    steps, width = input_ids.shape[1], state["ln_final.weight"].shape[0]
    heads = width // 64
    first = (torch.arange(len(state["positional_embedding"])) < keep).to(state["positional_embedding"].dtype)[:, None]
    x = state["token_embedding.weight"][input_ids]
    x = x + (first * state["positional_embedding"])[:steps] + ((1 - first) * state["positional_embedding_res"])[:steps]
    future = torch.full((steps, steps), float("-inf"), dtype=x.dtype).triu(1)
    for n in range(sum(name.endswith("in_proj_weight") for name in state)):
        block = f"transformer.resblocks.{n}"
        qkv = norm(x, state, f"{block}.ln_1") @ state[f"{block}.attn.in_proj_weight"].T
        q, k, v = (qkv + state[f"{block}.attn.in_proj_bias"]).unflatten(-1, (3, heads, 64)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 8 + future  # sqrt(64) = 8
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ state[f"{block}.attn.out_proj.weight"].T + state[f"{block}.attn.out_proj.bias"]
        inner = norm(x, state, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].T + state[f"{block}.mlp.c_fc.bias"]
        inner = inner * torch.sigmoid(1.702 * inner)
        x = x + inner @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    x = norm(x, state, "ln_final")
    return x, x[torch.arange(len(x)), input_ids.argmax(-1)] @ state["text_projection"]


def saved(state, folder, name="long.pt"):
    torch.save(state, folder / name)
    return folder / name


def encode(model, tokenizer, *prompts):
    inputs = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return model(inputs.input_ids, output_hidden_states=True)
