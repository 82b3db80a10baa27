"""Families of decoders against transformers: logits and gradients of every site.

    python benchmarks/decoder_families.py --peer benchmarks/peers/.venv/bin/python

A second python with torch and transformers writes folders of random weights.  They are
loaded here, and logits, the residual stream at every site, its gradients and the
patterns of attention compared at 16, 256 and 1024 tokens in float32.  Largest error,
relative to the largest entry; below 1e-5 or exit status 1.  bfloat16: ours and theirs
against theirs in float32, logits.  Takes ten minutes on two free cores, most of it
compilation; with ``--folder`` the files of the peer are kept, and with ``--out`` rows
that are there already are not computed again.  ``--golden tests/golden/decoder`` writes
the small files of the tests instead.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from harness import run_peer

import toyfeat as ft
from toyfeat.models.decoder import Decoder, load_decoder

CHILD = Path(__file__).parent / "peers" / "decoder_families.py"
GATE = 1e-5
SITES = ("resid_pre", "resid_mid", "resid_post")


def relative(got, want):
    """Largest error, relative to the largest entry."""
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def compare(folder, length):
    """Errors of one family at one number of tokens."""
    model = load_decoder(folder, tokenizer=False)
    theirs = np.load(folder / f"{length}.npz")
    tokens = jnp.asarray(theirs["tokens"], jnp.int32)
    names = sorted({k.removesuffix(".grads") for k in theirs if k.endswith(".grads")})
    probed = ft.from_linen(Decoder(model.config, heads=True))
    sites = {name: "blocks_{}/{}".format(*name.split(".")) for name in names}
    patterns = {k: f"blocks_{k[0]}/attn/pattern" for k in theirs if "pattern" in k}

    @jax.jit
    def ours(params, tokens):
        readout = ft.readouts.next_token_loss(tokens)
        taps = ft.tap(
            probed, params, tokens, sites=list(sites.values()), readout=readout
        )
        logits, acts = probed(params, tokens, {})
        return logits, taps, {name: acts[site] for name, site in patterns.items()}

    logits, taps, attention = jax.device_get(ours(model.params, tokens))
    acts, grads = [], []
    for name, site in sites.items():
        want = theirs[f"{name}.acts"]
        acts.append(relative(taps[site].acts.reshape(want.shape), want))
        grads.append(
            relative(taps[site].grads.reshape(want.shape), theirs[f"{name}.grads"])
        )
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    low = jax.jit(Decoder(model.config, dtype=jnp.bfloat16).apply)(half, tokens)
    return {
        "logits": relative(logits, theirs["logits"]),
        "acts": max(acts),
        "grads": max(grads),
        "pattern": max(relative(attention[k], theirs[k]) for k in patterns),
        "bf16": relative(low, theirs["logits"]),
        "peer_bf16": relative(theirs["logits_bfloat16"], theirs["logits"]),
        "sites": len(names),
    }


def run_gate(args, folder):
    """Compare all families at all lengths; returns the rows."""
    about_file = folder / "about.json"
    if not about_file.exists():
        about_file.write_text(json.dumps(run_peer(args.peer, CHILD, folder)))
    about, rows = json.loads(about_file.read_text()), []
    if args.out and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    done = {(row["case"], row["size"]) for row in rows}
    for length in about["lengths"]:
        for path in sorted(p for p in folder.iterdir() if p.is_dir()):
            if (path.name, length) in done:
                continue
            errors = compare(path, length)
            row = {"case": path.name, "size": length, **errors}
            rows.append({**row, "versions": about["versions"], "device": "cpu"})
            shown = " ".join(f"{k} {v:.1e}" for k, v in errors.items())
            print(f"{path.name:16} {length:5} {shown}", flush=True)
            if args.out:
                args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def main():
    """Run the gate, or write golden files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default=os.environ.get("TOYFEAT_PEER_PYTHON"))
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.golden:
        run_peer(args.peer, CHILD, args.golden, "--small")
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = run_gate(args, args.folder or Path(temporary))
    gate = max(max(row["logits"], row["grads"]) for row in rows)
    print(f"largest error of logits and gradients: {gate:.2g} (gate {GATE})")
    sys.exit(gate >= GATE)


if __name__ == "__main__":
    main()
