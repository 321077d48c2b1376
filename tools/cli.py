"""The command `cossl <verb>`: finds the verb, and turns a user's mistake into one line and exit code 2, Ctrl-C into one and 130."""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module

VERBS: dict[str, tuple[str, str, str]] = {  # verb: module, function, what it does
    "train": ("cossl.train", "main", "train a preset end to end: train demo | imagenette | in1k"),
    "runs": ("cossl.tools.runs", "runs_main", "which runs there are, and how far each is: runs --state running"),
    "convert": ("cossl.tools.write_beton", "convert_main", "an image folder to a beton: convert SRC OUT.beton"),
    "verify": ("cossl.tools.write_beton", "verify_main", "prove that a beton is whole: verify OUT.beton"),
    "bench": ("cossl.tools.bench", "main", "what things cost here, beside their peers: bench loaders"),
    "models": ("cossl.tools.models", "models_main", "what every backbone and local head sees and costs: models --view-px 224"),
    "eval": ("cossl.tools.evaluate", "eval_main", "kNN, linear probes, few shots and fine-tuning of what a run learned: eval RUN"),
    "export": ("cossl.tools.export", "export_main", "a run's backbone for others: safetensors, torchvision's and timm's names, ONNX"),
    "locality": ("cossl.tools.locality", "locality_main", "what single positions of the feature map say: locality RUN..."),
    "robustness": ("cossl.tools.robustness", "robustness_main", "accuracy under attacks, corruptions and damage: robustness RUN..."),
    "sweep": ("cossl.slurm.sweep", "main", "an ablation grid on SLURM: sweep plan | submit | status | retry | cancel | logs | collect"),
    "report": ("cossl.tools.report", "report_main", "runs or a sweep as one HTML page that needs no network: report RUN... | SWEEP"),
    "doctor": ("cossl.tools.doctor", "doctor_main", "where time goes on this machine, what limits, and which knob to turn"),
}


def main() -> None:
    """`cossl <verb> ...`; `cossl` alone lists the verbs."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print("usage: cossl VERB ...\n")
        for name, (_, _, what) in VERBS.items():
            print(f"  {name:<12}{what}")
        print("\ncossl VERB --help says more.")
        return
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f": did you mean {near[0]}?" if near else f": expected one of {', '.join(VERBS)}"
        print(f"cossl: unknown command {verb!r}{hint}", file=sys.stderr)
        raise SystemExit(2)
    module, function, _ = VERBS[verb]
    try:
        getattr(import_module(module), function)(rest)
    except BrokenPipeError:  # `cossl convert --help | head`
        if verb == "train":
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes what nobody read
        raise SystemExit(1) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if verb == "train":  # has told its user's mistakes from its own failures by then
            raise
        print(f"cossl {verb}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"cossl {verb}: stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
