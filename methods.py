"""The methods side by side, as the one table that everything else reads. It imports nothing slow.

| row      | put into BERT                         | trains, and is saved           | equation    |
|----------|---------------------------------------|--------------------------------|-------------|
| full     | nothing                               | everything                     |             |
| lora     | A, B beside linear layers (TARGETS)   | A, B, head                     | lora.py     |
| qlora    | NF4 encoder weights, then as lora     | A, B, head                     | quant.py    |
| dora     | A, B, m beside linear layers          | A, B, m, head                  | lora.py     |
| qdora    | NF4 encoder weights, then as dora     | A, B, m, head                  | both        |
| houlsby  | two bottlenecks a layer               | bottlenecks, LayerNorms, head  | adapters.py |
| pfeiffer | one bottleneck a layer                | bottlenecks, head              | adapters.py |
| bitfit   | nothing                               | biases, the pooler's too, head |             |
| head     | nothing                               | head                           |             |

The head is the same nn.Linear in all of them: on BERT's pooled [CLS] for sentences, on every token
for questions (start and end). The pooler is part of BERT: only `full` trains its weight, `bitfit`
its bias (as the authors' code does), and question answering has none. A model that comes without
pooler gets a new one, which trains with the head (model.py).

bitfit: Ben Zaken, Goldberg & Ravfogel 2022, https://arxiv.org/abs/2106.10199. Biases are those of
linear layers and of LayerNorms; what trains is in fp32 in every method.

To add a method: a row here, a case that the tools measure, and one file with the function that
changes BERT, which model.PUT names.
"""
import re
from typing import NamedTuple


class Rates(NamedTuple):
    """Hold the default learning rates of a method.

    The first was searched by validation on `movies` (docs/measuring.md); DoRA and Pfeiffer take
    LoRA r=16's and Houlsby's. The second is usual for bert-base. The third was best in the
    study on Portuguese SQuAD. BitFit's second is the default of its authors' code. BitFit's third
    and the head's second and third were not searched."""
    small: float  # the default model, whatever the task; lr_for knows two exceptions
    sentences: float  # other models
    questions: float  # other models


class Method(NamedTuple):
    label: str  # in tables and figures; {r} is the rank, {size} the width of an adapter
    flags: tuple  # the settings of its own; those of other methods are None
    adds: tuple  # parts of the names of the parameters that it adds: all of them train
    trains: tuple  # parts of the names of BERT's own parameters that train
    rates: Rates
    is_4bit: bool = False  # whether the encoder's weights are NF4
    merges: bool = True  # whether what it adds can be folded into BERT's own weights


FULL_RATES, NEW_RATES = Rates(5e-5, 2e-5, 4.25e-5), Rates(1e-3, 1e-4, 2e-4)
LORA, ADAPTER = ("r", "alpha", "dropout", "targets"), ("placement", "bottleneck", "reduction")
AB, ABM = ("lora_",), ("lora_", "magnitude")

METHODS = {
    # "" is a part of every name
    "full": Method("full fine-tuning", (), (), ("",), FULL_RATES),
    "lora": Method("LoRA r={r}", LORA, AB, (), NEW_RATES),
    "qlora": Method("QLoRA r={r}", LORA, AB, (), NEW_RATES, is_4bit=True),
    "dora": Method("DoRA r={r}", LORA, ABM, (), NEW_RATES),
    "qdora": Method("QDoRA r={r}", LORA, ABM, (), NEW_RATES, is_4bit=True),
    "houlsby": Method("adapter Houlsby {size}", ADAPTER, (".adapter.",),
                      (".LayerNorm.",), NEW_RATES, merges=False),
    "pfeiffer": Method("adapter Pfeiffer {size}", ADAPTER, (".adapter.",),
                       (), NEW_RATES, merges=False),
    "bitfit": Method("BitFit", (), (), (".bias",), Rates(2.5e-3, 1e-3, 1e-3)),
    "head": Method("head only", (), (), (), Rates(2e-1, 1e-3, 1e-3)),
}
HEAD = ("classifier.", "qa_outputs.")  # how the names of its parameters start; it trains always

# Where --targets puts LoRA and DoRA: linear layers of a BertLayer.
ATTENTION = tuple(f"attention.{name}" for name in ("self.query", "self.key", "self.value",
                                                   "output.dense"))
DEFAULT_TARGETS = "query value"
TARGETS = {DEFAULT_TARGETS: (ATTENTION[0], ATTENTION[2]),  # the LoRA paper's own, section 7.1
           "attention": ATTENTION,
           "all": (*ATTENTION, "intermediate.dense", "output.dense")}

# On the command line the two adapters are one method with a placement.
PLACEMENTS = [name for name, row in METHODS.items() if "placement" in row.flags]
CHOICES = [name for name in METHODS if name not in PLACEMENTS] + ["adapter"]


class Case(NamedTuple):
    flags: str  # of train.py
    color: str  # in figures; colour-blind safe: Okabe and Ito's, the last three Paul Tol's
    marker: str


# The methods as they are measured: tools.bench and tools.memory take all, run_all.sh takes STUDY.
CASES = {
    "full": Case("--method full", "#000000", "o"),
    "lora_r8": Case("--method lora --r 8", "#56B4E9", "s"),
    "lora_r16": Case("--method lora --r 16", "#0072B2", "D"),
    "qlora": Case("--method qlora --r 16", "#E69F00", "^"),
    "dora": Case("--method dora --r 16", "#CC79A7", "P"),
    "qdora": Case("--method qdora --r 16", "#D55E00", "X"),
    "adapter": Case("--method adapter", "#009E73", "v"),
    "pfeiffer": Case("--method adapter --placement pfeiffer", "#AA7744", "<"),
    "lora_r16_all": Case("--method lora --r 16 --targets all", "#332288", "p"),
    "bitfit": Case("--method bitfit", "#882255", "h"),
    "head": Case("--method head", "#999933", "d"),
}
STUDY = ("full", "lora_r8", "lora_r16", "qlora", "adapter")
FOLD_STUDY = (*STUDY, "lora_r16_all", "bitfit", "head")  # and these with --folds


def lr_for(row, r, targets):
    """Return the default learning rate on the default model of a row of METHODS."""
    if targets not in (None, DEFAULT_TARGETS):
        return 5e-4  # searched for "all"; "attention" takes it, too
    return 2e-3 if (row, r) == (METHODS["lora"], 8) else row.rates.small


def row_of(s):
    """Return the row of METHODS that the settings `s` of a run name."""
    return METHODS[s.placement or s.method]


def label_of(s):
    """Return what tables and figures call the method of the settings `s`."""
    label = row_of(s).label.format(r=s.r, size=s.bottleneck or f"h/{s.reduction}")
    return label if s.targets in (None, DEFAULT_TARGETS) else f"{label} ({s.targets})"


def named(text, methods):
    """Return which of `methods`, {name: settings}, a text means: by its name, by the label of the
    tables, or by its method or placement, if no other has that. None if it is none or several."""
    def plain(name):
        return re.sub("[^a-z0-9]", "", (name or "").lower())

    for names_of in (lambda name, s: (name, label_of(s)), lambda _, s: (s.method, s.placement)):
        found = [name for name, s in methods.items()
                 if plain(text) and plain(text) in map(plain, names_of(name, s))]
        if len(found) == 1:
            return found[0]
    return None


def trains(row, name):
    """Tell whether a parameter of this name trains, and is saved, with the method of `row`."""
    return any(part in name for part in (*row.adds, *row.trains)) or name.startswith(HEAD)


def kind_of(name):
    """Return the kind of a trained parameter that is not the head's: method, layer_norm or base."""
    if any(part in name for row in METHODS.values() for part in row.adds):
        return "method"
    return "layer_norm" if ".LayerNorm." in name else "base"
