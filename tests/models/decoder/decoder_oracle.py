"""Three architectures in float64 numpy, on tensors as checkpoints name them.

Written from the papers and from how ``transformers`` lays out its files.
"""

import numpy as np
from scipy.special import erf, expit, log_softmax, softmax

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 13,
    "n_layer": 3,
    "n_embd": 12,
    "n_head": 3,
    "n_inner": 20,
    "n_positions": 8,
    "layer_norm_epsilon": 1e-4,
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 13,
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 8,
    "rotary_pct": 0.5,
    "rotary_emb_base": 50,
    "layer_norm_eps": 1e-4,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 13,
    "num_hidden_layers": 3,
    "hidden_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "max_position_embeddings": 8,
    "rope_theta": 50.0,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "gpt2": GPT2,
    "gpt2-untied-relu": GPT2
    | {"tie_word_embeddings": False, "activation_function": "relu"},
    "neox": NEOX,
    "neox-sequential": NEOX | {"use_parallel_residual": False},
    "neox-unbiased-tied": NEOX
    | {"attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 1.0},
    "llama": LLAMA,
    "llama-linear": LLAMA
    | {"rope_scaling": {"type": "linear", "factor": 2.5}, "head_dim": 8},
    "llama3": LLAMA
    | {
        "head_dim": 10,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 40,
        },
    },
    "neox-linear": NEOX
    | {"rope_scaling": {"rope_type": "linear", "factor": 3, "rope_theta": 50}},
    "llama-biased-tied": LLAMA
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}


def tied(given):
    return given.get("tie_word_embeddings", given["model_type"] == "gpt2")


def tensor_shapes(given):
    """Names as the language model of ``transformers`` writes them, and shapes."""
    vocab = given["vocab_size"]
    shapes = {}

    def norm(name, width, kinds=("weight", "bias")):
        shapes.update({f"{name}.{kind}": (width,) for kind in kinds})

    def linear(name, out, into, bias=True, *, transposed=False):
        shapes[f"{name}.weight"] = (into, out) if transposed else (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    if given["model_type"] == "gpt2":
        dim, hidden = given["n_embd"], given["n_inner"]
        shapes["transformer.wte.weight"] = (vocab, dim)
        shapes["transformer.wpe.weight"] = (given["n_positions"], dim)
        for i in range(given["n_layer"]):
            at = f"transformer.h.{i}"
            norm(f"{at}.ln_1", dim)
            linear(f"{at}.attn.c_attn", 3 * dim, dim, transposed=True)
            linear(f"{at}.attn.c_proj", dim, dim, transposed=True)
            norm(f"{at}.ln_2", dim)
            linear(f"{at}.mlp.c_fc", hidden, dim, transposed=True)
            linear(f"{at}.mlp.c_proj", dim, hidden, transposed=True)
        norm("transformer.ln_f", dim)
        head = "lm_head"
    elif given["model_type"] == "gpt_neox":
        dim, hidden = given["hidden_size"], given["intermediate_size"]
        bias = given.get("attention_bias", True)
        shapes["gpt_neox.embed_in.weight"] = (vocab, dim)
        for i in range(given["num_hidden_layers"]):
            at = f"gpt_neox.layers.{i}"
            norm(f"{at}.input_layernorm", dim)
            norm(f"{at}.post_attention_layernorm", dim)
            linear(f"{at}.attention.query_key_value", 3 * dim, dim, bias)
            linear(f"{at}.attention.dense", dim, dim, bias)
            linear(f"{at}.mlp.dense_h_to_4h", hidden, dim)
            linear(f"{at}.mlp.dense_4h_to_h", dim, hidden)
        norm("gpt_neox.final_layer_norm", dim)
        head = "embed_out"
    else:
        dim, hidden = given["hidden_size"], given["intermediate_size"]
        heads = given["num_attention_heads"]
        width = given.get("head_dim") or dim // heads
        wide = heads * width
        narrow = (given.get("num_key_value_heads") or heads) * width
        bias, mlp_bias = given.get("attention_bias"), given.get("mlp_bias")
        shapes["model.embed_tokens.weight"] = (vocab, dim)
        for i in range(given["num_hidden_layers"]):
            at = f"model.layers.{i}"
            norm(f"{at}.input_layernorm", dim, ("weight",))
            linear(f"{at}.self_attn.q_proj", wide, dim, bias)
            linear(f"{at}.self_attn.k_proj", narrow, dim, bias)
            linear(f"{at}.self_attn.v_proj", narrow, dim, bias)
            linear(f"{at}.self_attn.o_proj", dim, wide, bias)
            norm(f"{at}.post_attention_layernorm", dim, ("weight",))
            linear(f"{at}.mlp.gate_proj", hidden, dim, mlp_bias)
            linear(f"{at}.mlp.up_proj", hidden, dim, mlp_bias)
            linear(f"{at}.mlp.down_proj", dim, hidden, mlp_bias)
        norm("model.norm", dim, ("weight",))
        head = "lm_head"
    if not tied(given):
        shapes[f"{head}.weight"] = (vocab, dim)
    return shapes


def random_tensors(given, seed=0):
    """Weights of a size at which every part of the model matters, float32."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(given).items():
        drawn = rng.normal(size=shape)
        if len(shape) == 1 and name.endswith("weight"):  # of a norm
            drawn = 1 + 0.3 * drawn
        elif "embed_" not in name and ".w" not in name.removesuffix(".weight"):
            drawn *= 1.5 / np.sqrt(max(shape))
        tensors[name] = drawn.astype("f4")
    return tensors


def without_prefix(tensors):
    prefixes = "transformer.", "gpt_neox.", "model."
    return {
        name[len(next((p for p in prefixes if name.startswith(p)), "")) :]: x
        for name, x in tensors.items()
    }


def forward(given, tensors, tokens, edits=None):
    """Logits ``[..., T, V]`` and ``{(layer, site): value}`` of tokens ``[..., T]``.

    ``edits`` maps ``(layer, site)`` to a function of the value there.
    """
    get = {k: np.asarray(x, np.float64) for k, x in without_prefix(tensors).items()}
    found = {}

    def at(layer, site, value):
        edit = (edits or {}).get((layer, site))
        found[layer, site] = value if edit is None else edit(value)
        return found[layer, site]

    logits = _FORWARDS[given["model_type"]](given, get, np.asarray(tokens), at)
    return logits, found


def gradients(given, tensors, tokens, layer, site, step=1e-5):
    """Of the summed next-token cross-entropy, by central differences, ``[T, D]``."""
    value = forward(given, tensors, tokens)[1][layer, site]
    steps = step * np.eye(value.size).reshape(-1, *value.shape)
    sides = [
        next_token_loss(
            forward(
                given, tensors, tokens[None], {(layer, site): lambda x, s=s: x + s}
            )[0],
            tokens,
        )
        for s in (steps, -steps)
    ]
    return ((sides[0] - sides[1]) / (2 * step)).reshape(value.shape)


def next_token_loss(logits, tokens):
    log = log_softmax(logits, axis=-1)
    return -sum(log[..., t, tokens[t + 1]] for t in range(len(tokens) - 1))


def _gpt2(given, get, tokens, at):
    dim, heads, eps = given["n_embd"], given["n_head"], given["layer_norm_epsilon"]
    act = _ACTS[given.get("activation_function", "gelu_new")]

    def conv1d(name, x):
        return x @ get[f"{name}.weight"] + get[f"{name}.bias"]

    x = get["wte.weight"][tokens] + get["wpe.weight"][: tokens.shape[-1]]
    for i in range(given["n_layer"]):
        x = at(i, "resid_pre", x)
        three = conv1d(f"h.{i}.attn.c_attn", _layer_norm(get, f"h.{i}.ln_1", x, eps))
        q, k, v = (
            three[..., part * dim : (part + 1) * dim].reshape(
                *x.shape[:-1], heads, dim // heads
            )
            for part in range(3)
        )
        mixed = _attention(q, k, v)
        x = x + at(i, "attn_out", conv1d(f"h.{i}.attn.c_proj", mixed))
        hidden = act(conv1d(f"h.{i}.mlp.c_fc", _layer_norm(get, f"h.{i}.ln_2", x, eps)))
        hidden = at(i, "mlp_hidden", hidden)
        x = x + at(i, "mlp_out", conv1d(f"h.{i}.mlp.c_proj", hidden))
        x = at(i, "resid_post", x)
    head = get["wte.weight"] if tied(given) else get["lm_head.weight"]
    return _layer_norm(get, "ln_f", x, eps) @ head.T


def _neox(given, get, tokens, at):
    dim, heads = given["hidden_size"], given["num_attention_heads"]
    eps = given["layer_norm_eps"]
    act = _ACTS[given.get("hidden_act", "gelu")]
    rope = given.get("rope_parameters", {})
    share = rope.get("partial_rotary_factor", given.get("rotary_pct"))
    base = rope.get("rope_theta", given.get("rotary_emb_base"))
    turned = int(share * (dim // heads))
    x = get["embed_in.weight"][tokens]
    for i in range(given["num_hidden_layers"]):
        name = f"layers.{i}"
        x = at(i, "resid_pre", x)
        read = _layer_norm(get, f"{name}.input_layernorm", x, eps)
        three = _linear(get, f"{name}.attention.query_key_value", read)
        three = three.reshape(*x.shape[:-1], heads, 3 * (dim // heads))
        q, k, v = np.split(three, 3, axis=-1)
        slower = slowed(given, turned, base)
        q, k = _rotary(q, turned, base, slower), _rotary(k, turned, base, slower)
        added = _linear(get, f"{name}.attention.dense", _attention(q, k, v))
        added = at(i, "attn_out", added)
        source = x if given["use_parallel_residual"] else x + added
        read = _layer_norm(get, f"{name}.post_attention_layernorm", source, eps)
        hidden = act(_linear(get, f"{name}.mlp.dense_h_to_4h", read))
        hidden = at(i, "mlp_hidden", hidden)
        out = at(i, "mlp_out", _linear(get, f"{name}.mlp.dense_4h_to_h", hidden))
        x = at(i, "resid_post", x + added + out)
    head = get["embed_in.weight"] if tied(given) else get["embed_out.weight"]
    return _layer_norm(get, "final_layer_norm", x, eps) @ head.T


def _llama(given, get, tokens, at):
    heads = given["num_attention_heads"]
    groups = given.get("num_key_value_heads") or heads
    eps = given["rms_norm_eps"]
    width = given.get("head_dim") or given["hidden_size"] // heads
    base = given.get("rope_parameters", given)["rope_theta"]
    x = get["embed_tokens.weight"][tokens]
    for i in range(given["num_hidden_layers"]):
        name = f"layers.{i}"
        x = at(i, "resid_pre", x)
        read = _rms_norm(get, f"{name}.input_layernorm", x, eps)
        q, k, v = (
            _linear(get, f"{name}.self_attn.{part}_proj", read).reshape(
                *x.shape[:-1], num, width
            )
            for part, num in (("q", heads), ("k", groups), ("v", groups))
        )
        slower = slowed(given, width, base)
        q, k = _rotary(q, width, base, slower), _rotary(k, width, base, slower)
        k, v = (np.repeat(y, heads // groups, axis=-2) for y in (k, v))
        added = _linear(get, f"{name}.self_attn.o_proj", _attention(q, k, v))
        x = x + at(i, "attn_out", added)
        read = _rms_norm(get, f"{name}.post_attention_layernorm", x, eps)
        gate = _ACTS["silu"](_linear(get, f"{name}.mlp.gate_proj", read))
        hidden = gate * _linear(get, f"{name}.mlp.up_proj", read)
        hidden = at(i, "mlp_hidden", hidden)
        x = x + at(i, "mlp_out", _linear(get, f"{name}.mlp.down_proj", hidden))
        x = at(i, "resid_post", x)
    head = get["embed_tokens.weight"] if tied(given) else get["lm_head.weight"]
    return _rms_norm(get, "norm", x, eps) @ head.T


_FORWARDS = {"gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama}

_ACTS = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_new": lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
}


def _linear(get, name, x):
    return x @ get[f"{name}.weight"].T + get.get(f"{name}.bias", 0.0)


def _layer_norm(get, name, x, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    scaled = (x - mean) / np.sqrt(var + eps)
    return scaled * get[f"{name}.weight"] + get[f"{name}.bias"]


def _rms_norm(get, name, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * get[f"{name}.weight"]


def _attention(q, k, v):
    """Of heads ``[..., T, H, d]``, joined to ``[..., T, H d]``."""
    scores = np.einsum("...qhd,...khd->...hqk", q, k) / np.sqrt(q.shape[-1])
    time = q.shape[-3]
    scores = np.where(np.tri(time, dtype=bool), scores, -np.inf)
    mixed = np.einsum("...hqk,...khd->...qhd", softmax(scores, axis=-1), v)
    return mixed.reshape(*mixed.shape[:-2], -1)


def slowed(given, turned, base):
    """What rates are divided by; of Llama 3 by how often a wave fits into the context.

    Waves that fit less than once (``low``) are stretched, those that fit more often
    than ``high`` stay, and rates between go from one to the other in a straight line.
    """
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "llama3":
        return np.ones(turned // 2) * (rope["factor"] if kind == "linear" else 1)
    rates = base ** (-np.arange(turned // 2) * 2 / turned)
    fits = rope["original_max_position_embeddings"] * rates / (2 * np.pi)
    between = rope["low_freq_factor"], rope["high_freq_factor"]
    return rates / (rates * np.interp(fits, between, (1 / rope["factor"], 1)))


def _rotary(x, turned, base, slower=1.0):
    """Entry ``j`` and entry ``j + turned / 2`` as one complex number, turned."""
    half = turned // 2
    rates = base ** (-np.arange(half) * 2 / turned) / slower
    angle = np.arange(x.shape[-3])[:, None] * rates
    z = (x[..., :half] + 1j * x[..., half:turned]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([z.real, z.imag, x[..., turned:]], axis=-1)
