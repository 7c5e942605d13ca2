"""SKPO, Skip-Connected Policy Optimization (Teng et al., arXiv 2604.08690), in one file.

    python skpo.py                                          # embedded tiny model and task, CPU, about a minute
    python skpo.py --model Qwen2.5-0.5B                     # from the hub, or a local folder; built-in arithmetic
    python skpo.py --model Qwen2.5-0.5B --data train.jsonl --eval_data aime24.jsonl,amc23.jsonl
    python skpo.py --algo grpo ...                          # the baseline, everything else the same
    python skpo.py --ablation no_skip ...                   # a row of Table 2; --analysis signs: Appendix A.2
    torchrun --standalone --nproc_per_node 8 skpo.py ...    # several GPUs
    python skpo.py --steps 0 --eval_data test.jsonl --model runs/x/model      # evaluation alone

GRPO gives every token of a response the same credit. Token-level credit by Monte Carlo needs hundreds of samples per
prefix before even its sign can be trusted. SKPO therefore looks at ONE position of a response only. For each prompt q:
  sample G upstream segments, pause them at t_q, keep the one of median surprise: s
  put it AHEAD of the prompt, [s, q], and sample G complete downstream responses from that
  reward each by its final answer; their mean is the Monte Carlo value of s, at no further cost
  downstream tokens: group-relative advantage, token-mean loss, clipped ratio as a constant (eq. 5)
  upstream tokens: that mean minus a running value of the prompt, batch-normalised, PPO-clip (eq. 6)
The skip connection [s, q] lets the model restart from the problem: s can help, mislead or be ignored, so the responses
stay diverse. Equation numbers are the paper's; "SPO" is Xu & Ding, arXiv 2509.13232, on which the upstream part rests.
"""
import argparse
import difflib
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import mpmath  # sympy's own arithmetic
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, HfArgumentParser,
                          LogitsProcessor, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)
from transformers.hf_argparser import HfArg


class UserError(Exception):
    """A mistake that its maker can mend: shown as one line, without a traceback."""


def brief(error):
    """An exception's message on one line."""
    return " ".join(str(error).split())[:250] or type(error).__name__


# ---- Config: the paper's Appendix C, a knob a line ------------------------------------------------------------------

@dataclass
class Config:
    """Every knob. The defaults are the paper's; EMBEDDED below holds those of the embedded model."""
    model: str = HfArg(default="embedded", help="transformers folder or hub name; 'embedded': a tiny one, built here")
    data: str = HfArg(default="", help="JSON lines of problems to train on; '': built-in ones")
    eval_data: str = HfArg(default="", help="JSON lines to evaluate on, several with commas; '': held-out "
                           "ones of data, or with --steps 0 all")
    out: str = HfArg(default="", help="folder of this run; '': a new one under runs/")
    algo: Literal["skpo", "grpo"] = HfArg(default="skpo", help="grpo: no upstream, G responses straight from q")
    ablation: Literal["none", "no_skip", "no_mc", "fixed_split", "extreme_selection"] = HfArg(
        default="none", help="a row of the paper's Table 2")
    analysis: Literal["none", "signs", "shortcut"] = HfArg(
        default="none", help="a table instead of a run: signs, Appendix A.2; shortcut, Figure 3 on --model")
    steps: int = HfArg(default=500, help="training steps; 0: evaluation alone")
    prompts_per_step: int = HfArg(default=128, help="B, prompts in a step")
    minibatches: int = HfArg(default=4, help="optimiser steps per training step, each on B / minibatches prompts")
    group_size: int = HfArg(default=8, help="G, samples per prompt")
    max_prompt_tokens: int = HfArg(default=1024, help="longer prompts are dropped")
    max_new_tokens: int = HfArg(default=3072, help="response limit, tokens")
    temperature: float = HfArg(default=1.0, help="of sampling; the policy is softmax(logits / temperature) throughout")
    lr: float = HfArg(default=1e-6, help="of AdamW, after the warm-up")
    warmup_steps: int = HfArg(default=10, help="training steps of linear warm-up")
    weight_decay: float = HfArg(default=0.1, help="of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are scaled down to this norm")
    clip_low: float = HfArg(default=0.2, help="ratio clipped at 1 - this; upstream also at 1 + this")
    clip_high: float = HfArg(default=0.28, help="ratio clipped at 1 + this downstream (Clip-Higher)")
    w_up: float = HfArg(default=0.5, help="weight of the upstream loss")
    w_down: float = HfArg(default=0.5, help="weight of the downstream loss; 1 with grpo")
    split_low: float = HfArg(default=1 / 6, help="t_q is drawn between split_low * L_q ...")
    split_high: float = HfArg(default=1 / 2, help="... and split_high * L_q")
    init_length: float = HfArg(default=1024, help="L_q of a prompt not seen yet, tokens")
    rho_min: float = HfArg(default=0.875, help="trackers: least memory, after a large move of the policy")
    rho_max: float = HfArg(default=0.96, help="trackers: most memory, after a small one")
    tau: float = HfArg(default=8.0, help="trackers: the divergence that halves the memory, before clipping")
    explore_eps: float = HfArg(default=0.05, help="added to every prompt's sampling weight")
    template: Literal["auto", "none"] = HfArg(default="auto", help="auto: chat template, if any, and ask for a box; "
                                              "none: the question exactly as it is")
    micro_tokens: int = HfArg(default=0, help="tokens in a training pass, padding counted; 0: 4096 on a GPU, "
                              "1024 on a CPU")
    cache_tokens: int = HfArg(default=0, help="tokens in the KV cache at once; more are sampled in turns; 0: no bound")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="of compute; auto: bfloat16 on a GPU; "
                                                          "weights are float32 always")
    device: str = HfArg(default="", help="cpu, cuda, cuda:1, mps; '': cuda if there is one")
    seed: int = HfArg(default=0, help="the same seed on the same machine gives the same numbers")
    eval_every: int = HfArg(default=50, help="steps between evaluations, first and last step included; 0: never")
    eval_samples: int = HfArg(default=4, help="k of avg@k, pass@k and maj@k, samples per evaluation problem")
    save_every: int = HfArg(default=50, help="steps between checkpoints; 0: none")
    resume: bool = HfArg(default=False, help="continue the run in --out from its checkpoint")


EMBEDDED = dict(steps=100, prompts_per_step=32, max_new_tokens=24, lr=3e-4, init_length=10, eval_every=50)


def check_config(c):
    """Every mistake that can be seen before a model is loaded. Raises UserError."""
    for name in ("prompts_per_step", "minibatches", "max_prompt_tokens", "max_new_tokens",
                 "eval_samples", "init_length", "lr", "tau", "max_grad_norm", "explore_eps"):
        if not 0 < getattr(c, name) < math.inf:
            raise UserError(f"--{name} must be above 0, not {getattr(c, name)}")
    for name in ("steps", "warmup_steps", "weight_decay", "eval_every", "save_every", "temperature", "cache_tokens",
                 "micro_tokens", "w_up", "w_down", "clip_low", "clip_high", "seed"):
        if not 0 <= getattr(c, name) < math.inf:
            raise UserError(f"--{name} must be 0 or more, not {getattr(c, name)}")
    for name in ("algo", "ablation", "analysis", "template", "dtype"):
        choices = next(f.type for f in fields(Config) if f.name == name).__args__
        if getattr(c, name) not in choices:
            raise UserError(f"--{name} must be one of {', '.join(choices)}, not {getattr(c, name)!r}")
    for wrong, message in [
        (c.seed >= 2**63, "--seed must be below 2^63"),
        (c.group_size < 2, f"--group_size must be 2 or more, not {c.group_size}: a prompt's samples are compared"),
        (c.prompts_per_step % c.minibatches,
         f"--minibatches {c.minibatches} does not divide --prompts_per_step {c.prompts_per_step}"),
        (not 0 < c.split_low <= c.split_high <= 1,
         f"the split needs 0 < --split_low {c.split_low:g} <= --split_high {c.split_high:g} <= 1"),
        (not 0 <= c.rho_min <= c.rho_max <= 1,
         f"the trackers need 0 <= --rho_min {c.rho_min:g} <= --rho_max {c.rho_max:g} <= 1"),
        (c.clip_low >= 1, f"--clip_low must be below 1, not {c.clip_low:g}"),
        (c.model == "embedded" and (c.data or c.eval_data),
         "the embedded model reads only its own problems: name a --model for --data and --eval_data"),
        (c.steps and not c.temperature,
         "--temperature 0 is greedy: good for evaluation (--steps 0), but it teaches nothing"),
        (c.ablation != "none" and c.algo != "skpo", f"--ablation {c.ablation} changes SKPO: leave out --algo {c.algo}"),
        (c.analysis != "none" and processes() > 1, "--analysis takes one process: leave out torchrun"),
        (processes() * c.minibatches > c.prompts_per_step,
         f"{processes()} processes need as many prompts in each of the {c.minibatches} mini-batches"),
    ]:
        if wrong:
            raise UserError(message)
    try:
        torch.empty(0, device=c.device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {c.device}: {brief(error)}") from None


# ---- Problems -------------------------------------------------------------------------------------------------------

@dataclass
class Problem:
    """A question and its reference answer; prepare_data adds the prompt's token ids."""
    question: str
    answer: str
    ids: list = None


ASK = "Please reason step by step, and put your final answer within \\boxed{}."


def load_problems(source):
    """The problems of a JSON-lines file ("question" or "problem", and "answer": text, number or GSM8K's "#### 18"),
    or a built-in set: "sums" (the embedded model's) or "arithmetic". Returns list[Problem]; raises UserError."""
    if source in ("sums", "arithmetic"):
        return builtin_problems(source)
    problems = []
    try:
        lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{source} is not text: JSON lines are wanted") from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}, line {number}: not JSON ({str(error)[:80]})") from None
        if not isinstance(row, dict):
            raise UserError(f'{source}, line {number}: not an object with "question" and "answer"')
        question, answer = row.get("question", row.get("problem")), row.get("answer")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f'{source}, line {number}: no text in "question" or "problem"')
        reference = str(answer).rsplit("####", 1)[-1].strip()
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not reference:
            raise UserError(f'{source}, line {number}: no text or number in "answer"')
        problems.append(Problem(*(x.encode(errors="replace").decode() for x in (question, reference))))  # no surrogates
    if not problems:
        raise UserError(f"{source} holds no problems")
    return problems


def builtin_problems(name, n=2048):
    """"sums": six digits to add one by one, modulo 10. "arithmetic": one line each, for a real pretrained model."""
    rng = np.random.default_rng(20260409)
    if name == "sums":
        digits = rng.permutation(10**6)[:n]
        return [Problem(f"{d:06d}", str(sum(map(int, str(d))) % 10)) for d in digits]
    pairs = {}  # a dict: no problem twice
    for i, (a, b, c, d) in enumerate(rng.integers(2, 100, (n, 4)).tolist()):
        question, answer = [(f"{a} + {b} * {c}", a + b * c), (f"({a} + {b}) * {c} - {d}", (a + b) * c - d),
                            (f"{a} * {b} - {c} * {d}", a * b - c * d), (f"{a} + {b} + {c} - {d}", a + b + c - d)][i % 4]
        pairs[f"What is {question}?"] = str(answer)
    return [Problem(question, answer) for question, answer in pairs.items()]


def prompt_ids(tokenizer, question, template="auto"):
    """The token ids of a prompt. The question exactly as it is for "none"; with "auto" the request for a box follows,
    inside the tokenizer's chat template if it has one."""
    if template == "auto" and tokenizer.chat_template:
        messages = [{"role": "user", "content": f"{question}\n{ASK}"}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    ids = tokenizer(question if template == "none" else f"{question}\n{ASK}\n")["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text


# ---- Rewards: is the last box right? --------------------------------------------------------------------------------
# Model output is untrusted text, so nothing here evaluates it as code: a parser of our own turns it into numbers, and
# every size is bounded before anything is computed.

MP = mpmath.MPContext()
MP.dps = 60
TOKEN = re.compile(r"\\[a-zA-Z]+|\d+\.?\d*|\.\d+|[a-zA-Z]|\S")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?", re.I)
DECIMAL = re.compile(r"\.\d*[1-9]")  # 27.0 is an integer
FUNCTIONS = {name: getattr(MP, {"arc": "a"}.get(name[:3], name[:3]) + name[3:]) for name in
             "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan exp ln".split()} | {"log": MP.ln}
THOUSANDS = re.compile(r"^\s*[-+]?\d{1,3}(,\d{3})+(?=\.\d|\s*(\\?%)?\s*$)")  # 12,144 is a number, 12, 144 a list
# x =, f(x) =, x in
NAMED = re.compile(r"^\s*(\\[a-zA-Z]+|[A-Z]{2,3}|[a-zA-Z])(_\{?\w\}?)?(\([a-z]\))?\s*(=|\\in(?![a-zA-Z]))\s*")
UNITS = re.compile(r"(?<=[\d}])\s*\b(?!\w*(?:hundred|thousand|illion|squared|cubed|factorial))"
                   r"([a-zA-Z]{3,}[a-zA-Z. ]*|[cmk]m|kg|in|ft|ml|hr|am|pm)"
                   r"(\^\s*\{?\d\}?)?$|(?<=\d)([cmk]m|kg|ft|ml)$")
CONSTANTS = {r"\pi": MP.pi, r"\infty": MP.inf, "e": MP.e, "i": MP.mpc(0, 1)}
DEGREES = r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degree"
UNIFY = [(re.compile(pattern), new) for pattern, new in [
    (r"\\mathrm\{\s*([ei])\s*\}", r"\1"), (r"\\text\{\s*((?:hundred|thousand|\w*illion)[^{}]*)\}", r" \1"),
    (r"\\(le|ge)q(?![a-zA-Z])", r"\\\1"), (r"\\varnothing", r"\\emptyset"), (r"\\[dt]binom", r"\\binom"),
    (r"[−–]", "-"), ("π", r"\\pi "), ("∞", r"\\infty "), ("√", r"\\sqrt "), ("×|·", r"\\times "), ("÷", "/"),
    (r"\\(?:left|right|displaystyle|limits|bigl?|bigr?|Bigl?|Bigr?)(?![a-zA-Z])|\\[!;:]|\\[()]|~", ""),
    (r"(?<=\d)(?:\{,\}|\\,|,\\!)(?=\d{3})", ""), (r"\\,|\\ |\\q?quad", " "),  # thousands, then spaces
    (r"\\\$|[$£€]", ""), (DEGREES, ""),
    (r"\\[dtc]frac", r"\\frac"), (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
    (r"\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", ","), (r"\*\*", "^"), (r"\\div(?![a-zA-Z])", "/"),
    (r"\\(?:cdot|ast)(?![a-zA-Z])|\*", r"\\times "), (r"\\infinity|infinity", r"\\infty "),
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|exp|infty)(?![a-zA-Z])", r"\\\1 "),
    (r"\\(frac|sqrt)\s*(\d)", r"\\\1{\2}"), (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),  # \frac12
    (r"(?<![\d.^_{])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),  # mixed numbers
    (r"(?<![\d.^_/])(\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1+\2/\3)"),
]]
WRAP = re.compile(r"\\(?:(?:text|math)(?:rm|bf|it)?|boldsymbol|mbox|operatorname|boxed)\s*\{([^{}]*)\}"
                  r"(?:\s*\^\s*\{?\d\}?)?")


def extract_answer(text):
    r"""What the last complete \boxed{...} holds, braces balanced; None if there is none or it is empty. One pass."""
    last, last_start, opened = None, -1, []
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.S):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else -1)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > last_start:  # of nested boxes, the inner one
                last, last_start = text[start:token.start()].strip(), start
    return last or None


def is_correct(response, answer):
    """Whether the last box of response (text) holds answer (text): equal as text, as number, or as expression.
    Never raises, never runs what it reads, bounded in time."""
    given = extract_answer(response)
    return given is not None and same_answer(given, str(answer))


def same_answer(a, b):
    """Whether two answers are equal. Cheap comparisons first."""
    a, b = a.strip(), b.strip()
    if a == b or max(len(a), len(b)) > 1000:
        return a == b != ""
    if NUMBER.fullmatch(a) and NUMBER.fullmatch(b):
        return close(Fraction(a), Fraction(b), bool(DECIMAL.search(a + " " + b)))
    try:
        return same_value(tidy(a), tidy(b))
    except (ValueError, ArithmeticError, TypeError, RecursionError, IndexError, MemoryError, NotImplementedError):
        return False  # not something with a value


def tidy(text):
    """LaTeX without its decoration: one spelling for each symbol, no units, no "x =", no final point."""
    if re.search("sin|cos|tan|cot|sec|csc", text):  # elsewhere degrees are a unit
        text = re.sub(DEGREES, r"\\times\\pi/180 ", text)
    for pattern, new in UNIFY:
        text = pattern.sub(new, text)
    bare = WRAP.sub(" ", text)
    text = bare if re.search(r"\w", bare) else WRAP.sub(r"\1", text)  # beside a value, text is a unit
    text = UNITS.sub("", text.strip().rstrip(".").strip())
    return re.sub(r"^\(\s*([A-Za-z])\s*\)$", r"\1", text).strip()


def pieces(text, separator):
    """text cut at the separators that stand outside every bracket."""
    parts, depth = [""], 0
    for token in re.findall(r"\\[a-zA-Z]+|\\?.", text, re.S):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def members(text):
    """(brackets, items): brackets for a tuple or an interval, whose items are ordered; "" for a set, list, union or
    plus-minus, whose items are not; None for a single value."""
    union, listed, inner = pieces(text, r"\cup"), pieces(text, ","), pieces(text[1:-1], ",")
    if len(union) > 1:
        return "", union
    if re.fullmatch(r"\\\{.*\\\}", text, re.S):
        return "", pieces(text[2:-2], ",")
    if len(listed) > 1:
        return "", listed
    if text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}") and len(inner) > 1 == len(listed):
        return "" if text[0] == "{" else text[0] + text[-1], inner
    return ("", [text.replace(r"\pm", sign) for sign in "+-"]) if r"\pm" in text else (None, [text])


def same_value(a, b):
    """Whether two tidy answers are equal: members of tuples, sets, ... one by one, words as words, else by value."""
    a, b = (THOUSANDS.sub(lambda number: number[0].replace(",", ""), NAMED.sub("", t)) for t in (a, b))
    a, b = (re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", re.sub(r"_\{(\w)\}(?!\w)", r"_\1", t)) for t in (a, b))
    (kind, left), (other_kind, right) = members(a), members(b)
    if a == b or kind != other_kind or len(left) != len(right) or len(left) > 20:
        return a == b != ""
    if kind:
        return all(map(same_value, left, right))
    if kind == "":  # unordered: cross each one off
        for item in left:
            match = next((i for i, other in enumerate(right) if same_value(item, other)), None)
            if match is None:
                return False
            del right[match]
        return True
    if any(re.fullmatch(r"[a-zA-Z ]{3,}", text) for text in (a, b)):  # words are no products of letters
        return a.casefold().split() == b.casefold().split()
    percent = [text.endswith("%") for text in (a, b)]  # may stand for its number or its hundredth
    a, b = (re.sub(r"\s*\\?%$", "", text) for text in (a, b))
    loose, points = bool(DECIMAL.search(a + " " + b)), range(4 if re.search("[a-zA-Z]", a + b) else 1)
    pairs = [(latex_value(a, point), latex_value(b, point)) for point in points]
    scales = {(1, 1), (1, 1) if all(percent) else tuple(100 if p else 1 for p in percent)}
    return any(all(close(u / i, v / j, loose) for u, v in pairs) for i, j in scales)


def lift(x):
    """A Fraction as an mpmath number; others as they are."""
    return MP.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def close(a, b, loose):
    """Equality of two numbers: to 1e-6 relative if loose (one side was a decimal), else exact for Fractions and to 45
    digits for the irrational."""
    if isinstance(a, Fraction) and isinstance(b, Fraction) and not loose:
        return a == b
    a, b = lift(a), lift(b)
    limit = max(abs(a), abs(b)) * MP.mpf("1e-6") if loose else max(abs(a), abs(b), 1) * MP.mpf("1e-45")
    return bool(a == b or MP.isfinite(a) and MP.isfinite(b) and abs(a - b) <= limit * (1 + MP.mpf("1e-20")))


def power(a, b):
    """a ** b: exact for Fractions of modest size, ValueError instead of a huge number."""
    real = isinstance(a, Fraction) and isinstance(b, Fraction)
    if real and b.denominator == 1:
        if abs(b) * (a.numerator.bit_length() + a.denominator.bit_length()) > 25000:
            raise ValueError("too large to be exact")
        return a ** int(b)
    if real and b == Fraction(1, 2) and a >= 0:
        root = Fraction(math.isqrt(a.numerator), math.isqrt(a.denominator))
        if root ** 2 == a:
            return root
    a, b = lift(a), lift(b)
    if abs(b) > 1e6 or a and abs(b * MP.log(abs(a))) > 1e5:
        raise ValueError("too large")
    return MP.power(a, b)


def latex_value(text, point=0):
    r"""The number that a LaTeX expression stands for: a Fraction while exact, else an mpmath number; its letters
    take values from a fixed table, another at each point. A recursive-descent parser, which pops what it has read;
    ValueError on anything it does not know, and on anything too large."""
    tokens = TOKEN.findall(text)[::-1]
    if len(tokens) > 300:
        raise ValueError("too long")

    def take(*wanted):
        return tokens.pop() if tokens and (not wanted or tokens[-1] in wanted) else None

    def closed(end):
        value = total()
        if not take(end):
            raise ValueError(f"{end} missing")
        return value

    def total():
        value = product()
        while tokens and tokens[-1] in ("+", "-"):
            value = value + product()  # its sign is read with it
        return value

    def product(argument=False):  # the argument of a function ends where the next function begins
        value = raised()
        while tokens and tokens[-1] not in ("+", "-", ")", "]", "}", "|"):
            if argument and tokens[-1][1:] in FUNCTIONS:
                break
            if tokens[-1][0].isdecimal():
                raise ValueError("two numbers in a row")
            divided = take("/", r"\times") == "/"
            value = value * (power(raised(), Fraction(-1)) if divided else raised())
        return value

    def raised():
        if sign := take("+", "-"):
            return raised() if sign == "+" else -raised()
        value = atom()
        while mark := take("^", "!"):
            if mark == "!" and not (value in range(301)):
                raise ValueError("factorial")
            value = Fraction(math.factorial(int(value))) if mark == "!" else power(value, raised())
        return value

    def function(name):
        base, exponent = take("_") and atom(), take("^") and raised()
        if exponent == -1 and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, None
        value = lift(atom() if tokens and tokens[-1] in ("(", "{", "[") else product(argument=True))
        logarithm = name in ("ln", "log")
        if logarithm and not value or abs(value) > 1e6 and not logarithm:
            raise ValueError("out of range")
        value = FUNCTIONS[name](value) / (MP.log(lift(base)) if base else 1)
        return power(value, exponent) if exponent else value

    def atom():
        token = take() or ""
        if re.match(r"\.?\d", token):
            return Fraction(token)
        if token in ("(", "[", "{"):
            return closed({"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            return abs(closed("|"))
        if token == r"\frac":
            return atom() * power(atom(), Fraction(-1))
        if token == r"\binom":
            n, k = atom(), atom()
            if n not in range(301) or k not in range(301):
                raise ValueError("binomial")
            return Fraction(math.comb(int(n), int(k)))
        if token == r"\sqrt":
            root, value = closed("]") if take("[") else Fraction(2), atom()
            odd = isinstance(value, Fraction) and value < 0 and root % 2 == 1  # then the real root
            return -power(-value, 1 / root) if odd else power(value, 1 / root)
        if token[1:] in FUNCTIONS and len(token) > 1:
            return function(token[1:])
        if token in CONSTANTS:
            return CONSTANTS[token] * MP.one
        if re.fullmatch(r"[a-zA-Z]|\\(alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)", token):
            draw = random.Random(f"{token}{atom() if take('_') else ''} {point}")  # by name
            return Fraction((-1) ** point * draw.randint(3, 91), draw.randint(7, 67))
        raise ValueError(f"unknown {token}")

    value = total()
    if tokens:
        raise ValueError(f"{tokens[-1]} left over")
    return value


# ---- Model and tokenizer --------------------------------------------------------------------------------------------

HUB = {"qwen": "Qwen", "llama": "meta-llama", "smollm": "HuggingFaceTB", "gemma": "google", "mistral": "mistralai",
       "deepseek": "deepseek-ai", "phi": "microsoft", "olmo": "allenai"}


def load_model(config):
    """The policy, float32 weights on its device, and its tokenizer: a folder, a hub name (a bare one finds its
    organisation), or "embedded". Safetensors only, no remote code."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.model == "embedded":
        model, tokenizer = embedded_model(config.seed, steps=0 if config.resume else 300)  # resumed: weights follow
        return model.to(device), tokenizer
    source, local = config.model, Path(config.model).is_dir()
    if not local:
        family = re.match(r"[a-z]*", source.lower())[0]
        source = source if "/" in source else f"{HUB.get(family, source)}/{source}"
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise UserError(f"no model folder {config.model}")
        local = hub_unreachable(source)  # then only what was downloaded before can serve
    try:
        options = dict(local_files_only=local, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot load --model {config.model} (looked for {source}): {brief(error)}") from None
    model = model.eval().to(device)  # no dropout: pi at the update must be the pi that sampled
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise UserError(f"--model {config.model} holds weights that are not finite numbers")
    ids, head = torch.arange(4, device=device)[None], model.get_output_embeddings()
    with torch.no_grad():
        if not torch.allclose(model(ids).logits, head(model.base_model(ids).last_hidden_state), atol=1e-3):
            raise UserError(f"--model {config.model}: this architecture does more to its logits than one linear head")
    model.generation_config = GenerationConfig(eos_token_id=eos_ids(model, tokenizer) or None)  # the rest is not pi
    return model, tokenizer


def hub_unreachable(source):
    """False if the hub has this model; True if only the local cache has it; UserError, within seconds, if neither."""
    from huggingface_hub import model_info, try_to_load_from_cache
    try:
        model_info(source, timeout=5)
        return False
    except Exception as error:  # offline, refused, gated, misspelt: the hub's client has many ways to say so
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return True
        raise UserError(f"no folder {source} here, and the hub did not give it ({brief(error)})") from None


def embedded_model(seed, steps=300, batch=64, slips=0.2):
    """A character-level Qwen2 of 75k parameters (\\boxed{ is one token) that stands in for a pretrained one: supervised
    for seconds on worked digit sums in which every fifth step slips, so that it knows how, yet is often wrong. In half
    of the documents a partial attempt stands ahead of the problem, as in [s, q]."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocab = {c: i for i, c in enumerate([*"0123456789=", "\\boxed{", "}", "<eos>", "<unk>"])}
    chars = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    chars.pre_tokenizer, chars.decoder = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=chars, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'].split('\\n')[0] }}="  # the question alone, then "="
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 0])
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=vocab["<eos>"], pad_token_id=vocab["<eos>"], initializer_range=0.1,  # 0.02 starts ten times later
        problems="sums"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    equals, box, end = [vocab["="]], [vocab["\\boxed{"]], [vocab["}"], vocab["<eos>"]]
    for step in tqdm(range(steps), "supervised warm-up of the embedded model", leave=False, disable=rank() > 0 or None):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        digits = rng.integers(10, size=(batch, 6))
        slip = rng.integers(1, 10, (batch, 6)) * (rng.random((batch, 6)) < slips)
        work = (digits + slip).cumsum(1) % 10  # [batch, 6]: running sums, a slip carried on
        ahead = np.where(rng.random((batch, 6)) < slips, rng.integers(10, size=(batch, 6)), work)
        ahead = [a[:n] for a, n in zip(ahead.tolist(), rng.integers(1, 7, batch) * (rng.random(batch) < 0.5))]
        texts = [a + d + equals + w + box + w[-1:] + end for a, d, w in zip(ahead, digits.tolist(), work.tolist())]
        ids, mask = pad(texts)  # [batch, T]
        answer = torch.arange(ids.shape[1]) >= torch.tensor([[len(a) + 7] for a in ahead])  # all that follows "="
        model(ids, attention_mask=mask, labels=ids.where(answer & mask.bool(), -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def eos_ids(model, tokenizer):
    """Every id that ends a response: the tokenizer's and all of the generation_config's."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})


def prepended_bos(tokenizer):
    """The BOS id if the tokenizer opens texts with it, else None: where it merely opens a chat turn (SmolLM2's
    <|im_start|>) it is part of the prompt and stays in its place."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else None


# ---- Rollouts and log-probs. Both compute a prompt's keys and values once and share them among its rows. ------------

@dataclass
class Sample:
    """What was sampled after a prompt."""
    tokens: list  # ids, EOS included
    logprobs: list  # nats, of each token under the policy that sampled it
    finished: bool  # the last token is an EOS


CHUNK = 32  # tokens sampled between two looks at which rows may leave


class Recorder(LogitsProcessor):
    """Tempers the logits and keeps log pi of each token drawn: a draw is seen as the last input id of the next call."""
    def __init__(self, temperature):
        self.temperature, self.logits, self.kept = temperature or 1.0, None, []

    def __call__(self, input_ids, logits):
        self.keep(input_ids)
        self.logits = logits if self.temperature == 1 else logits / self.temperature
        return self.logits  # [N, V]

    def keep(self, input_ids):
        if self.logits is not None:
            self.kept.append(self.logits.gather(1, input_ids[:, -1:]).squeeze(1) - self.logits.logsumexp(1))  # [N]


def pad(sequences, left=False, value=0):
    """Lists of ids -> (ids [N, T], mask [N, T]), T at least 1, padded at the right or the left. The mask is of lengths,
    never of values: a pad id may be an EOS id."""
    width = max(1, *map(len, sequences))
    fill = [width - len(s) for s in sequences]
    ids = [[value] * f + list(s) if left else list(s) + [value] * f for s, f in zip(sequences, fill)]
    mask = [[0] * f + [1] * len(s) if left else [1] * len(s) + [0] * f for s, f in zip(sequences, fill)]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


@torch.no_grad()
def generate(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0, cache_tokens=0):
    """n samples for each prompt (token-id lists of any lengths), straight from softmax(logits / temperature);
    temperature 0 is greedy. max_new_tokens: an int of 1 or more, or one per prompt. Returns [P][n] Samples.
    Of the model's generation_config only the EOS ids count: its top_k, penalties, ... would leave pi.
    With cache_tokens, prompts whose keys and values could exceed that many tokens are sampled in turns."""
    budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if cache_tokens and len(prompts) > 1 and n * (max(map(len, prompts)) + max(budgets)) * len(prompts) > cache_tokens:
        half = len(prompts) // 2
        return [group for part in (slice(half), slice(half, None)) for group in
                generate(model, tokenizer, prompts[part], n, budgets[part], temperature, cache_tokens)]
    eos = eos_ids(model, tokenizer)
    samples = [Sample([], [], False) for _ in range(len(prompts) * n)]
    ids, mask = (x.to(model.device) for x in pad(prompts, left=True))  # [P, T]
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        model.base_model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=(mask.cumsum(1) - 1).clamp(0)[:, :-1],
                         past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(n)  # P -> P * n rows
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)  # [P * n, T]
    rows, own = list(range(len(samples))), model.generation_config  # rows: the sample of each row of ids
    try:
        while rows:
            room = [budgets[r // n] - len(samples[r].tokens) for r in rows]
            model.generation_config = GenerationConfig(
                max_new_tokens=min(CHUNK, sorted(room)[len(room) // 8]),  # until an eighth have spent their budgets
                do_sample=temperature > 0, temperature=1.0, top_k=0 if temperature else None, top_p=1.0,
                eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0)
            recorder = Recorder(temperature)
            ids = model.generate(ids, attention_mask=mask, past_key_values=cache, logits_processor=[recorder],
                                 synced_gpus=False)  # its weights are whole: processes need not wait for one another
            recorder.keep(ids)  # the last draw
            drawn = len(recorder.kept)
            mask = torch.cat([mask, mask.new_ones(len(mask), drawn)], 1)  # [N, T + drawn]
            drawn_ids, drawn_logprobs, staying = ids[:, -drawn:].tolist(), torch.stack(recorder.kept, 1).tolist(), []
            for j, (tokens, logprobs) in enumerate(zip(drawn_ids, drawn_logprobs)):  # [N][drawn]
                s = samples[rows[j]]
                end = next((t + 1 for t, token in enumerate(tokens[:room[j]]) if token in eos), min(room[j], drawn))
                s.tokens += tokens[:end]
                s.logprobs += logprobs[:end]
                s.finished = tokens[end - 1] in eos
                if not s.finished and end < room[j]:
                    staying.append(j)
            if 0 < len(staying) < len(rows):  # the others leave the batch and the cache
                keep = torch.tensor(staying, device=ids.device)
                ids, mask = ids[keep], mask[keep]
                cache.batch_select_indices(keep)
            rows = [rows[j] for j in staying]
    finally:
        model.generation_config = own
    return [samples[i:i + n] for i in range(0, len(samples), n)]


def sampler(model, tokenizer, config):
    """generate, with the run's settings."""
    def sample(prompts, n, max_new_tokens):
        with autocast(config, model.device):
            return generate(model, tokenizer, prompts, n, max_new_tokens, config.temperature, config.cache_tokens)
    return sample


def response_logprobs(model, prompts, responses, temperature=1.0):
    """log pi(o_t | prompt, o_<t) of each response token, with gradients. prompts and responses: N lists of ids each.
    Returns logprobs, entropy, polarity (chunked_logprobs) and mask, all [N, T], 0 where padded. Equal prompts are run
    once: the cache carries gradients, so the rows share one forward of all but the prompt's last token, which opens
    every row instead."""
    device = model.device
    shared = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    owner = torch.tensor([shared[tuple(p)] for p in prompts], device=device)  # [N]
    cache = DynamicCache(config=model.config)
    prefix, prefix_mask = (x.to(device) for x in pad([p[:-1] for p in shared], left=True))  # [P, S]
    model.base_model(prefix, attention_mask=prefix_mask, position_ids=(prefix_mask.cumsum(1) - 1).clamp(0),
                     past_key_values=cache, use_cache=True)
    cache.batch_select_indices(owner)  # P -> N rows
    before = prefix_mask[owner]  # [N, S]
    ids, mask = (x.to(device) for x in pad([[p[-1], *o[:-1]] for p, o in zip(prompts, responses)]))  # [N, T]
    positions = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=device)
    hidden = model.base_model(ids, attention_mask=torch.cat([before, mask], 1), position_ids=positions,
                              past_key_values=cache, use_cache=True).last_hidden_state  # [N, T, D]
    mask = mask.bool()
    targets = pad(responses)[0].to(device)[mask]  # [sum of lengths]
    packed = chunked_logprobs(model.get_output_embeddings(), hidden[mask], targets, temperature)  # 3 x [sum of lengths]
    return *(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in packed), mask


def chunked_logprobs(head, hidden, targets, temperature=1.0, chunk=1024):
    """Of p = softmax(head(hidden) / temperature), hidden [M, D], three tensors [M], float32: log p[target] in nats,
    with gradients; the entropy H of p; and the polarity sum_k p_k^2 (log p_k + H) - p_a (log p_a + H), a = target: how
    H changes, to first order, if the logits take a policy-gradient step of weight 1 on a (arXiv 2605.11775).
    A chunk's logits [chunk, V] live only while they are used: the backward pass computes them again."""
    def piece(h, a):
        logits = head(h).float() / temperature  # [m, V]
        normaliser = logits.logsumexp(1)  # [m]
        logprobs = logits.gather(1, a[:, None]).squeeze(1) - normaliser  # [m]
        # The backward pass recomputes no further than to here. Autocast would turn einsum to bfloat16.
        with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
            over_V, log_p = partial(torch.einsum, "mv,mv->m"), logits - normaliser[:, None]  # [m, V]
            p = log_p.exp()  # [m, V]
            H, p_p = -over_V(p, log_p), over_V(p, p)  # [m] each
            polarity = over_V(p.square_(), log_p) + p_p * H - logprobs.exp() * (logprobs + H)  # [m]
        return logprobs, H, polarity
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return [torch.cat(x) for x in zip(*(checkpoint(piece, h, a, use_reentrant=False) for h, a in chunks))]


# ---- Upstream, phase I (Section 3.2): split, cut, select; and the skip connection -----------------------------------

def split_position(length, rng, low=1 / 6, high=1 / 2):
    """t_q ~ Uniform[low * L_q, high * L_q], in tokens, at least 1 (eq. 2). rng: NumPy's or random's."""
    return max(1, round(rng.uniform(low * length, high * length)))


def cut_segment(sample):
    """A segment that ended before its pause is cut to half of its length, EOS not counted, at least 1 token (which is
    the EOS itself if nothing else was sampled)."""
    half = max(1, (len(sample.tokens) - 1) // 2)
    return Sample(sample.tokens[:half], sample.logprobs[:half], False) if sample.finished else sample


def select_segment(segments, middle=np.median):
    """The index of the Sample whose mean surprise d = mean_t -log pi(s_t | q, s_<t) is nearest to the median of all (in
    the ablation, their min or max); the first on a tie. G segments in, one out: the others cost no second batch."""
    d = np.array([-np.mean(s.logprobs) for s in segments])  # [G], nats per token
    gap = np.abs(d - middle(d))
    return int(np.flatnonzero(gap <= gap.min() + 1e-9)[0])  # with G even, two are equally near but for rounding


def skip_prompt(segment, prompt, bos_token_id=None):
    """[s, q]: the segment's ids, then the whole prompt's; a BOS that opens q is moved to the very front."""
    segment, prompt = list(segment), list(prompt)
    if bos_token_id is not None and prompt[:1] == [bos_token_id]:
        return prompt[:1] + segment + prompt[1:]
    return segment + prompt


# ---- Value estimation and running trackers (Section 3.3; SPO eq. 5-7, 11) -------------------------------------------

def monte_carlo_value(rewards):
    """R_I(s, a) = mean_i R_II(o_i, a) (eq. 3): [B, G] of +-1 -> [B] in [-1, 1]."""
    return rewards.mean(1)


class Tracker:
    """A running mean per prompt that forgets faster the further the policy has moved (SPO eq. 5-7). One for V(q), one
    for L_q. value [size]; count [size], the effective number of observations, 0 for a prompt not seen yet."""
    def __init__(self, size, initial, rho_min=0.875, rho_max=0.96, tau=8.0):
        self.value, self.count = np.full(size, float(initial)), np.zeros(size)
        self.rho_min, self.rho_max, self.tau = rho_min, rho_max, tau

    def update(self, indices, observations, divergences):
        """indices [B] distinct, observations [B], divergences [B] of pi since the last visit, nats per token."""
        i, D = np.asarray(indices), np.asarray(divergences, float)
        rho = np.clip(2.0 ** (-D / self.tau), self.rho_min, self.rho_max)
        seen = rho * self.count[i] + 1
        self.value[i] += (np.asarray(observations, float) - self.value[i]) / seen  # the first replaces the initial
        self.count[i] = seen


def choose_prompts(values, n, rng, eps=0.05):
    """n distinct indices, drawn with weight sqrt(v (1 - v)) + eps (SPO eq. 11): values [size] in [0, 1] -> [n]."""
    weight = np.sqrt(np.clip(values * (1 - values), 0, None)) + eps
    return rng.choice(len(values), n, replace=False, p=weight / weight.sum())


# ---- Advantages and losses (Sections 3.3, 3.4) ----------------------------------------------------------------------

def standardise(x):
    """(x - mean) / population std along the last dimension; all 0, not NaN, where its values are all equal."""
    equal = (x == x[..., :1]).all(-1, keepdim=True)
    std = x.std(-1, correction=0, keepdim=True).masked_fill(equal, 1)
    return ((x - x.mean(-1, keepdim=True)) / std).masked_fill(equal, 0)


def group_advantages(rewards):
    """Downstream: A_i = (R_i - mean R) / std R within each prompt's group. [B, G] -> [B, G]."""
    return standardise(rewards)


def upstream_advantages(values, baselines):
    """SPO: A = R_I - V(q), normalised over the batch. values [B] and baselines [B], both in [-1, 1] -> [B]."""
    return standardise(values - baselines)


def downstream_loss(logprobs, old_logprobs, advantages, mask, row_weight, clip_low=0.2, clip_high=0.28):
    """-sum w sg(clip(r, 1 - low, 1 + high)) A log pi(o_t | ...) (eq. 5), r = pi / pi_old. The clipped ratio is a
    constant: every token keeps a gradient. logprobs, old_logprobs, mask [N, T]; advantages, row_weight [N] -> scalar.
    row_weight is 1 / (tokens of the prompt's group * prompts of the mini-batch), so any cut into passes sums alike."""
    ratio = (logprobs.detach() - old_logprobs).exp().clamp(1 - clip_low, 1 + clip_high)  # [N, T]
    return -(ratio * advantages[:, None] * logprobs * mask * row_weight[:, None]).sum()


def upstream_loss(logprobs, old_logprobs, advantages, mask, row_weight, clip_low=0.2, clip_high=0.2):
    """-sum w min(r A, clip(r, 1 - low, 1 + high) A) (eq. 6), PPO's: a token clipped in its advantage's direction loses
    its gradient. Shapes as above; row_weight is 1 / (tokens of the segment * prompts of the mini-batch)."""
    ratio = (logprobs - old_logprobs).exp()  # [N, T]
    A = advantages[:, None]
    return -(torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A) * mask * row_weight[:, None]).sum()


# ---- Update ---------------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """One sequence's part in a mini-batch's loss."""
    prompt: list  # q for a segment, [s, q] for a response
    sample: Sample
    advantage: float
    weight: float
    upstream: bool


def micro_batches(prompts, responses, limit):
    """Cuts N rows (lists of ids) into forward passes of at most `limit` tokens, padding and shared prompts counted (a
    longer row goes alone). Rows of like length together, within a factor of sqrt 2, and among those the rows of one
    prompt; a row that would cost an eighth of a pass in padding opens the next. Yields lists of row indices."""
    first = {}
    owner = [first.setdefault(tuple(p), i) for i, p in enumerate(prompts)]  # [N], the first row of the same prompt

    def cost(rows):
        padded = max(len(responses[i]) for i in rows), max(len(prompts[i]) for i in rows)
        return len(rows) * padded[0] + len({owner[i] for i in rows}) * padded[1]
    batch = []
    for i in sorted(range(len(owner)), key=lambda i: (round(2 * math.log2(len(responses[i]))), owner[i])):
        if batch and (cost(batch + [i]) > limit or cost(batch + [i]) - cost(batch) - cost([i]) > limit / 8):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def update(model, optimizer, rows, config):
    """One optimiser step on the rows of a mini-batch (step 9). Rows without an advantage add nothing to the gradient:
    they count in the weights of the others, and are not run. Returns sums for the log."""
    log, rows = Counter(updates=1), [r for r in rows if r.advantage]
    w_down = config.w_down if config.algo == "skpo" else 1.0
    cut = micro_batches([r.prompt for r in rows], [r.sample.tokens for r in rows], pass_tokens(config, model))
    passes, idle = [[rows[i] for i in batch] for batch in cut], Row([0], Sample([0], [0.0], False), 0.0, 0.0, False)
    passes += [[idle]] * (max(everyone(len(passes))) - len(passes))  # torchrun only: all processes make as many
    each_shard(model, "unshard")
    for batch in passes:
        with autocast(config, model.device):
            logprobs, entropy, polarity, mask = response_logprobs(
                model, [r.prompt for r in batch], [r.sample.tokens for r in batch], config.temperature)  # [N, T] each
        logprobs.retain_grad()
        old = logprobs.new_tensor([p for r in batch for p in r.sample.logprobs])
        old = torch.zeros_like(logprobs).masked_scatter(mask, old)  # [N, T], 0 where padded
        A, weight = logprobs.new_tensor([(r.advantage, r.weight) for r in batch]).T  # [N] each
        up = torch.tensor([[r.upstream] for r in batch], device=mask.device)  # [N, 1]: which loss is a row's
        loss_up = upstream_loss(logprobs, old, A, mask & up, weight, config.clip_low, config.clip_low)
        loss_down = downstream_loss(logprobs, old, A, mask & ~up, weight, config.clip_low, config.clip_high)
        (config.w_up * loss_up + w_down * loss_down).backward()
        if batch[0] is not idle:
            ratio = (logprobs.detach() - old).exp()  # [N, T]
            clipped = (ratio < 1 - config.clip_low) | (ratio > 1 + torch.where(up, config.clip_low, config.clip_high))
            expands = -logprobs.grad * polarity  # [N, T]: minus the loss's gradient is the weight of a token's step
            log.update(tokens=mask.sum().item(), ratio=ratio[mask].sum().item(), clipped=clipped[mask].sum().item(),
                       entropy=entropy.sum().item(), polarity_up=(expands * up).sum().item(),
                       polarity_down=(expands * ~up).sum().item())
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.max_grad_norm)
    norm = (norm.full_tensor() if processes() > 1 and passes else norm).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    each_shard(model, "reshard")
    log.update(grad_norm=norm if math.isfinite(norm) else 0, skipped=not math.isfinite(norm))
    return log


def pass_tokens(config, model):
    """The tokens of a forward pass: a GPU wants many at once, a CPU is as fast with few, in less memory."""
    return config.micro_tokens or (4096 if model.device.type == "cuda" else 1024)


def compute_dtype(config, device):
    """bfloat16 on a GPU, float32 elsewhere, or what was asked for."""
    bf16 = config.dtype == "bfloat16" or config.dtype == "auto" and device.type == "cuda"
    return torch.bfloat16 if bf16 else torch.float32


def autocast(config, device):
    """bfloat16 compute over float32 master weights, which a step of 1e-6 still reaches; float32 where asked."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(config, device) == torch.bfloat16)


# ---- One training step: the algorithm, in the order of the paper ----------------------------------------------------

@dataclass
class State:
    """What a run carries from step to step, beside weights and optimiser."""
    values: Tracker  # V(q), in [0, 1]
    lengths: Tracker  # L_q, in tokens
    kept: dict  # prompt index -> the Sample selected at its last visit
    step: int = 0


def training_step(model, tokenizer, optimizer, problems, state, config):
    """Steps 1 to 11 on B prompts. Returns the row for metrics.jsonl and a few rollouts to read. This process samples M
    of the prompts, `mine`: all B, in order, but under torchrun."""
    c, B, G, even = config, config.prompts_per_step, config.group_size, state.step % 2 == 0
    start, rng, bos = time.perf_counter(), seed_everything(c.seed, state.step), prepended_bos(tokenizer)
    sample = sampler(model, tokenizer, c)

    def reward(i, ids):
        return 1.0 if is_correct(tokenizer.decode(ids, skip_special_tokens=True), problems[i].answer) else -1.0
    # 1. Choose B distinct prompts, those of middling value most often. V and L_q are read here, before their update.
    chosen = choose_prompts(state.values.value, B, rng, c.explore_eps)
    V, L_q = torch.tensor(2 * state.values.value[chosen] - 1), state.lengths.value[chosen]  # [B]: in [-1, 1]; tokens
    mine = share(L_q, c.minibatches)  # [M]
    each_shard(model, "unshard")
    q, x = 2 * [[problems[i].ids for i in chosen[mine]]]  # x: what the responses follow, q itself for GRPO
    segments, drift, drawn = [None] * len(q), [0.0] * len(q), []
    if c.algo == "skpo":
        # 2. Upstream: G segments per prompt, paused at t_q; those that ended before are cut to half.
        low, high = c.split_low, c.split_high
        if c.ablation == "fixed_split":
            low = high = low if even else high
        t_q = [min(split_position(L, rng, low, high), c.max_new_tokens) for L in L_q]  # [B]
        drawn = sample(q, G, [t_q[b] for b in mine])  # [M][G]
        # 3. Select the segment of median surprise.
        middle = np.median if c.ablation != "extreme_selection" else np.min if even else np.max
        cut = [[cut_segment(s) for s in group] for group in drawn]
        segments = [group[select_segment(group, middle)] for group in cut]  # [M]
        # 4. Skip connection: the segment first, then the whole prompt.
        x = [skip_prompt(s.tokens, p, bos) if c.ablation != "no_skip" else p + s.tokens for s, p in zip(segments, q)]
        # (11.) How far pi has moved since its last visit: by the pi that samples now, so before the update.
        drift = policy_drift(model, q, [state.kept.get(i) for i in chosen[mine]], c)  # [M]
    # 5. Downstream: G complete responses from [s, q].
    responses = sample(x, G, c.max_new_tokens)  # [M][G]
    # 6. Rewards: +1 or -1 per response; their mean is the Monte Carlo value of the segment.
    ahead = [s.tokens if c.ablation == "no_skip" else [] for s in segments]  # what a response goes on from
    rewards = [[reward(i, a + o.tokens) for o in g] for i, a, g in zip(chosen[mine], ahead, responses)]  # [M][G]
    values = monte_carlo_value(torch.tensor(rewards)).tolist()  # [M]
    if c.ablation == "no_mc":  # the reward of one continuation of the segment's own
        own = sample([p + s.tokens for p, s in zip(q, segments)], 1, c.max_new_tokens)  # [M][1]
        values, drawn = [reward(i, s.tokens + o.tokens) for i, s, (o,) in zip(chosen[mine], segments, own)], drawn + own
    lengths = [mean([len(a + o.tokens) for o in group]) for a, group in zip(ahead, responses)]  # [M]
    truncated = [mean([not o.finished for o in group]) for group in responses]  # [M]
    rollout_seconds = time.perf_counter() - start
    # From here on, R_II [B][G] and R_I, lengths, truncated, drift and kept [B] are those of all processes.
    R_II, R_I, lengths, truncated, drift, kept = gather(mine, rewards, values, lengths, truncated, drift, segments)
    # 7. and 8. Advantages, downstream within the group, upstream against the running value.
    down = group_advantages(torch.tensor(R_II)).tolist()  # [B][G]
    up = upstream_advantages(torch.tensor(R_I).double(), V).tolist()  # [B]
    # 9. and 10. The losses, and one optimiser step per mini-batch of prompts.
    update_start = time.perf_counter()
    log = Counter(sampled=sum(len(s.tokens) for group in drawn + responses for s in group))
    lr = optimizer.param_groups[0]["lr"] = c.lr * min(1.0, state.step / max(1, c.warmup_steps))
    for part in np.split(np.arange(B), c.minibatches):
        rows = []
        for b, q_b, x_b, segment, group in zip(mine, q, x, segments, responses):
            if b in part:
                weight = 1 / (sum(len(o.tokens) for o in group) * len(part))
                rows += [Row(x_b, o, A, weight, False) for o, A in zip(group, down[b])]
                if segment:
                    rows.append(Row(q_b, segment, up[b], 1 / (len(segment.tokens) * len(part)), True))
        log.update(update(model, optimizer, rows, c))
    # 11. Trackers: the observed value and length; the segment is kept to measure how far pi moves until next time.
    state.values.update(chosen, (np.array(R_I) + 1) / 2, drift)
    state.lengths.update(chosen, lengths, drift)
    state.kept.update((i, s) for i, s in zip(chosen.tolist(), kept) if s)

    skipped, seconds = log["skipped"], time.perf_counter() - start
    log = total(log)
    per_token = lambda name: log[name] / log["tokens"] if log["tokens"] else None  # None: nothing was trained on
    metrics = dict(
        step=state.step, reward=mean(R_II), mc_value=mean(R_I), accuracy=mean(np.array(R_II) > 0),
        zero_advantage=mean([not any(A) for A in down]), segment_tokens=mean([len(s.tokens) if s else 0 for s in kept]),
        response_tokens=mean(lengths), truncated=mean(truncated), clip_fraction=per_token("clipped"),
        ratio=per_token("ratio"), entropy=per_token("entropy"), polarity_up=log["polarity_up"] / c.minibatches,
        polarity_down=log["polarity_down"] / c.minibatches, grad_norm=log["grad_norm"] / log["updates"],
        skipped=skipped, lr=lr, tokens=log["sampled"], seconds=seconds, rollout_seconds=rollout_seconds,
        update_seconds=time.perf_counter() - update_start, tokens_per_second=log["sampled"] / seconds,
        peak_memory_gb=peak_memory_gb(model.device))
    reading = [dict(step=state.step, question=problems[chosen[b]].question, answer=problems[chosen[b]].answer,
                    prompt=tokenizer.decode(x_b), segment=tokenizer.decode(kept[b].tokens) if kept[b] else "",
                    value=R_I[b], responses=[dict(text=tokenizer.decode(o.tokens, skip_special_tokens=True), reward=r)
                                                for o, r in zip(group, R_II[b])])
               for b, x_b, group in list(zip(mine, x, responses))[:2]]
    return metrics, reading


def policy_drift(model, prompts, kept, config):
    """D: how far the policy moved since it last acted on each prompt, the mean over the tokens of the segment kept then
    of |log pi_then - log pi_now|; 0 without one. prompts [B] id lists, kept [B] of Sample or None -> [B], nats."""
    drift, again = np.zeros(len(prompts)), [b for b, s in enumerate(kept) if s]
    passes = micro_batches([prompts[b] for b in again], [kept[b].tokens for b in again], pass_tokens(config, model))
    for batch in ([again[i] for i in rows] for rows in passes):
        with torch.no_grad(), autocast(config, model.device):
            now, *_ = response_logprobs(model, [prompts[b] for b in batch], [kept[b].tokens for b in batch],
                                        config.temperature)  # [N, T]
        for b, logprobs in zip(batch, now.tolist()):
            drift[b] = np.mean(np.abs(np.subtract(kept[b].logprobs, logprobs[:len(kept[b].tokens)])))
    return drift


def seed_everything(seed, step):
    """Each step's random numbers depend on the seed and the step alone: a resumed run needs no others. NumPy's come
    back, the same for all processes; torch's are set, for each process others."""
    rng = np.random.default_rng([seed, step])
    torch.manual_seed(int(rng.integers(2**62)) + rank())
    return rng


def peak_memory_gb(device):
    """The most memory so far: the GPU's as allocated, else the process's; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    except ImportError:  # Windows
        return 0.0


# ---- Evaluation -----------------------------------------------------------------------------------------------------

def evaluate(model, tokenizer, problems, config):
    """From k samples for each problem, of q alone, without any segment: avg@k, the share of right answers; pass@j, that
    of problems with a right one in j samples; maj@k, that of problems whose most frequent answer is right."""
    seed_everything(config.seed, 10**9)  # the same draws at every evaluation
    each_shard(model, "unshard")
    mine, k = np.arange(rank(), len(problems), processes()), config.eval_samples if config.temperature else 1
    at_once = max(1, config.prompts_per_step * config.group_size // k // processes())  # as many rows as training has
    right, majority, sample = [], [], sampler(model, tokenizer, config)
    for part in (mine[i:i + at_once] for i in range(0, len(mine), at_once)):
        groups = sample([problems[i].ids for i in part], k, config.max_new_tokens)
        for i, group in zip(part, groups):
            texts = [tokenizer.decode(s.tokens, skip_special_tokens=True) for s in group]
            right.append([is_correct(text, problems[i].answer) for text in texts])  # [M][k]
            vote = majority_vote([extract_answer(text) for text in texts])
            majority.append(vote is not None and right[-1][vote])  # [M]
    right, majority = gather(mine, right, majority)  # M -> P
    pass_at = {j: mean([pass_at_k(k, sum(r), j) for r in right]) for j in (1, 2, 4, 8, 16, 32, 64, k) if j <= k}
    return dict(accuracy=mean(right), pass_at=pass_at, majority=mean(majority), samples=k, problems=len(problems))


def mean(xs):
    return float(np.mean(xs))


def pass_at_k(n, right, k):
    """The chance that k of n samples, `right` of them right, hold a right one: 1 - C(n - right, k) / C(n, k)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def same_answers(answers):
    """For each of k answers (text, None without a box) the index of the first one that the grader holds equal."""
    equal = lambda a, b: a == b or None not in (a, b) and same_answer(a, b)
    firsts = []
    for i, a in enumerate(answers):
        firsts.append(next((j for j in dict.fromkeys(firsts) if equal(a, answers[j])), i))
    return firsts


def majority_vote(answers):
    """The index of the first answer among the most frequent ones; None if there is no answer."""
    votes = Counter(i for i, a in zip(same_answers(answers), answers) if a is not None)
    return votes.most_common(1)[0][0] if votes else None


# ---- Analyses (Section 4.1, Appendix A): tables that need no training -----------------------------------------------

def sign_accuracy(rates, n, rng):
    """Appendix A.2: how well n continuations per prefix tell which prefixes are better than their group's mean.
    rates [trials, G]: true success rates. Returns (share of single signs right, share of trials with all G right)."""
    hits = rng.binomial(n, rates)  # [trials, G]
    positive, truth = hits > hits.mean(1, keepdims=True), rates > rates.mean(1, keepdims=True)
    right = positive == truth  # [trials, G]
    return right.mean(), right.all(1).mean()


def signs_table(spreads=(0.01, 0.02, 0.05, 0.1, 0.2, 0.4), samples=(8, 32, 128, 512, 2048), G=8, trials=4000, seed=0):
    """Rows {spread, n=8, n=32, ...}: the share of groups with all G signs right. True rates ~ Normal(0.5, spread)."""
    rng, table = np.random.default_rng(seed), []
    for spread in spreads:
        rates = np.clip(rng.normal(0.5, spread, (trials, G)), 0, 1)
        table.append({"spread": spread} | {f"n={n}": float(sign_accuracy(rates, n, rng)[1]) for n in samples})
    return table


def shortcut_table(model, tokenizer, problems, config):
    """Section 4.1, Figure 3: what a segment does to the responses of a model as it is. For six positions in a full
    response, and G responses after nothing (q), after the segment (q + s) and behind the skip connection ([s, q]): the
    number of distinct final answers, the share of groups with equal rewards, the mean length of what was sampled."""
    c, bos, table, sample = config, prepended_bos(tokenizer), [], sampler(model, tokenizer, config)
    seed_everything(c.seed, 0)

    def measure(position, condition, prompts, segments):
        groups = sample(prompts, c.group_size, c.max_new_tokens)
        ahead = segments if condition == "continual" else [[]] * len(prompts)
        texts = [[tokenizer.decode(a + o.tokens, skip_special_tokens=True) for o in g] for a, g in zip(ahead, groups)]
        right = np.array([[is_correct(t, p.answer) for t in g] for p, g in zip(problems, texts)])  # [P, G]
        distinct = [len(set(same_answers([extract_answer(t) for t in g]))) for g in texts]
        table.append(dict(
            position=round(position, 3), condition=condition, segment=mean([len(s) for s in segments]),
            diversity=mean(distinct), zero_advantage=mean(right.all(1) | ~right.any(1)),
            response=mean([len(o.tokens) for g in groups for o in g]), accuracy=mean(right)))
    q = [p.ids for p in problems]
    whole = [group[0].tokens for group in sample(q, 1, c.max_new_tokens)]
    measure(0.0, "unconditional", q, [[]] * len(q))
    for position in tqdm(np.linspace(1 / 6, 1 / 2, 6), "positions", leave=False, disable=None):
        segments = [o[:max(1, round(position * len(o)))] for o in whole]
        measure(position, "continual", [p + s for p, s in zip(q, segments)], segments)
        measure(position, "skip", [skip_prompt(s, p, bos) for p, s in zip(q, segments)], segments)
    return table


def print_table(rows):
    """Dicts of like keys as aligned columns."""
    cells = [list(rows[0])] + [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


# ---- Several processes (torchrun). The reader of the algorithm can skip this: with one process nothing happens here. -

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(config):
    """Under torchrun: one process per GPU (or several on the CPU, for tests), of which the first one prints."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        cuda = (config.device or "cuda") == "cuda" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")


def shard(model, config):
    """FSDP2: of weights, gradients and optimiser state each process holds its part, in float32. The weights that
    compute (bfloat16, or config.dtype) are whole on every process and gathered anew after each optimiser step only, so
    that the processes may sample different lengths without waiting for one another."""
    policy = MixedPrecisionPolicy(compute_dtype(config, model.device), torch.float32)
    for module in [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])] + [model]:
        fully_shard(module, mp_policy=policy, reshard_after_forward=False)
        module.set_reshard_after_backward(False)
        module.set_gradient_divide_factor(1)  # a sum over processes, no mean: a row's weight is that in the whole batch
        module.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device))  # the first forward pass makes model the root
    each_shard(model, "reshard")


def each_shard(model, do):
    """"unshard": gathers the weights, wherever that is still to do; "reshard": lets go of them, outdated by a step."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            getattr(module, do)()


def everyone(x):
    """[x of process 0, x of process 1, ...]."""
    parts = [x]
    if processes() > 1:
        parts = [None] * processes()
        dist.all_gather_object(parts, x)
    return parts


def share(lengths, minibatches):
    """The indices [M] of this process's prompts. Of every mini-batch the longest go first, each to the process that has
    least to do so far. lengths [B]: expected, in tokens."""
    load, mine = np.zeros(processes()), []
    for part in np.split(np.arange(len(lengths)), minibatches):
        for b in part[np.argsort(-lengths[part], kind="stable")]:
            least = load.argmin()
            load[least] += lengths[b]
            if least == rank():
                mine.append(b)
    return np.sort(mine)


def gather(mine, *columns):
    """Each process's columns, lists [M] with an entry for each index in mine -> the lists [B] of all, in order."""
    rows = [row for part, columns in everyone((mine, columns)) for row in zip(part, *columns)]
    return list(map(list, zip(*sorted(rows, key=lambda row: row[0]))))[1:]


def total(log):
    """The sum of every process's Counter."""
    whole = Counter()
    for part in everyone(log):
        whole.update(part)
    return whole


# ---- The run: files, checkpoints, the loop --------------------------------------------------------------------------

STOP = []  # signals received: the step in progress is finished, a checkpoint written, the run ended
LOOP = []  # filled when there are steps to finish: a signal before that ends the run at once


def open_run(config):
    """The run's folder, made and proved writable before anything is computed. A folder with a run in it is left alone
    unless that run is resumed."""
    name = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.algo}-{Path(config.model).name}"
    out = Path(config.out or next(p for i in range(1000) if not Path(p := name + f"-{i}" * (i > 0)).exists()))
    if config.resume and not (config.out and (out / "checkpoint.pt").is_file()):
        raise UserError(f"--resume: no checkpoint in {out}; start anew with another --out" if config.out else
                        "--resume needs --out, the folder of the run")
    if not config.resume and any((out / f).exists() for f in ("config.json", "metrics.jsonl", "model")):
        more = ", or continue that one with --resume" * (out / "checkpoint.pt").exists()
        raise UserError(f"{out} already holds a run: choose another --out{more}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").write_text("writable\n")
        (out / ".probe").unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    return out


def append(path, row):
    """One more line of JSON, by the first process."""
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the same files from any number of processes


def save_checkpoint(out, model, optimizer, state):
    """Everything a run needs to go on, in one file that replaces the old one by rename: a kill at any moment leaves one
    or the other whole. The lengths of the logs come along: what was written after them is cut off on resume."""
    weights, moments = get_state_dict(model, optimizer, options=WHOLE)  # whole on the first process, which writes
    if rank():
        return
    logs = [f for f in ("metrics.jsonl", "samples.jsonl") if (out / f).exists()]
    data = dict(step=state.step, model=weights, optimizer=moments,
                trackers=[(t.value.tolist(), t.count.tolist()) for t in (state.values, state.lengths)],
                kept={i: (s.tokens, s.logprobs, s.finished) for i, s in state.kept.items()},
                sizes={f: (out / f).stat().st_size for f in logs})
    fresh = out / "checkpoint.tmp"
    try:
        with open(fresh, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, out / "checkpoint.pt")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        fresh.unlink(missing_ok=True)
        raise UserError(f"cannot save a checkpoint in {out} ({brief(error)}); the one before is untouched") from None


def load_checkpoint(out, model, optimizer, state, config):
    """Puts model, optimizer, state and the logs back where save_checkpoint saw them."""
    try:
        data = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        for tracker, saved in zip((state.values, state.lengths), data["trackers"]):
            if len(saved[0]) != len(tracker.value):
                raise ValueError(f"it has {len(saved[0])} problems, --data now gives {len(tracker.value)}")
            tracker.value, tracker.count = map(np.array, saved)
        set_state_dict(model, optimizer, model_state_dict=data["model"], optim_state_dict=data["optimizer"],
                       options=WHOLE)
        optimizer.param_groups[0]["weight_decay"] = config.weight_decay  # its other settings are no flags, or set anew
        state.kept, state.step = {i: Sample(*s) for i, s in data["kept"].items()}, data["step"]
        for name, size in data["sizes"].items():
            os.truncate(out / name, size)
    except Exception as error:  # whatever a file may hold
        raise UserError(f"cannot resume from {out / 'checkpoint.pt'}: {brief(error)}") from None


def read_data(config):
    """What the files of --data and --eval_data hold: (list[Problem] or None, {name: list[Problem]}). Read before a
    model is loaded: a mistake in them is told at once."""
    problems = load_problems(config.data) if config.data else None
    if problems and config.steps and len(problems) < config.prompts_per_step:
        raise UserError(f"{config.data} holds fewer problems than --prompts_per_step {config.prompts_per_step}: "
                        "lower that")
    paths = [f.strip() for f in config.eval_data.split(",") if f.strip()]
    stems = [Path(f).stem for f in paths]
    return problems, {s if stems.count(s) == 1 else f: load_problems(f) for s, f in zip(stems, paths)}


def prepare_data(config, problems, tests, model, tokenizer):
    """read_data's problems with their prompts' ids; too-long prompts are dropped, aloud. Without data, those built in
    for the model; without tests, an eighth is held out."""
    c, problems = config, problems or builtin_problems(getattr(model.config, "problems", "arithmetic"))
    if not tests and not c.steps and not c.resume:
        tests = {"data": problems}
    elif not tests:  # whatever the other settings: a run may be resumed with others
        held, order = min(256, len(problems) // 8), np.random.default_rng(0).permutation(len(problems))
        tests = {"held-out": [problems[i] for i in order[:held]]} if held else {}
        problems = [problems[i] for i in sorted(order[held:])]

    def short(problems, name):
        whole = [replace(p, ids=prompt_ids(tokenizer, p.question, c.template)) for p in problems]
        fits = [p for p in whole if 0 < len(p.ids) <= c.max_prompt_tokens]
        if len(fits) < len(whole):
            print(f"{name}: dropped {len(whole) - len(fits)} of {len(whole)} problems, "
                  f"their prompts longer than {c.max_prompt_tokens} tokens")
        return fits
    problems, tests = short(problems, "training"), {name: short(p, name) for name, p in tests.items()}
    if c.steps and len(problems) < c.prompts_per_step:
        raise UserError(f"the {len(problems)} problems left to train on are too few for --prompts_per_step "
                        f"{c.prompts_per_step}: lower it, or bring more problems")
    if not all(tests.values()):
        raise UserError("an evaluation set has no problems left: raise --max_prompt_tokens")
    longest = max(len(p.ids) for part in (problems, *tests.values()) for p in part)
    longest += c.max_new_tokens + (round(c.split_high * c.max_new_tokens) if c.algo == "skpo" else 0)
    if longest > getattr(model.config, "max_position_embeddings", longest):
        print(f"note: prompt, segment and response may reach {longest} tokens, beyond the model's "
              f"{model.config.max_position_embeddings}: lower --max_new_tokens")
    return problems, tests


def set_up(config, data, out):
    """Model, tokenizer, training problems, {name: evaluation problems}, optimizer, state: new or from a checkpoint."""
    c = config
    model, tokenizer = load_model(c)
    problems, tests = prepare_data(c, *data, model, tokenizer)
    if processes() > 1:
        shard(model, c)
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, (0.9, 0.999), weight_decay=c.weight_decay, fused=True)
    state = State(*(Tracker(len(problems), x, c.rho_min, c.rho_max, c.tau) for x in (0.5, c.init_length)), {})
    if c.resume:
        load_checkpoint(out, model, optimizer, state, c)
    if rank() == 0 and (c.steps or not c.resume):  # a look at a run leaves its settings alone
        (out / "config.tmp").write_text(json.dumps(asdict(c), indent=1) + "\n")
        os.replace(out / "config.tmp", out / "config.json")
    size, sets = sum(p.numel() for p in model.parameters()), [f"{name} {len(p)}" for name, p in tests.items()]
    print(f"model     {c.model}, {size / 1e6:.2f}M parameters, on {processes()} x {model.device.type}\n"
          f"problems  {len(problems)} to train on; evaluation: {', '.join(sets) or 'none'}\n"
          f"folder    {out}")
    if c.steps:
        rows = f"{c.prompts_per_step} prompts x {c.group_size} responses of up to {c.max_new_tokens} tokens"
        print(f"plan      {c.algo}{f', {c.ablation}' * (c.ablation != 'none')}, steps {state.step + 1} to {c.steps}, "
              f"{rows}, lr {c.lr:g}")
    return model, tokenizer, problems, tests, optimizer, state


def train(config):
    """Evaluates, trains config.steps steps, evaluates again; writes everything into its folder and returns that. With
    config.analysis, a table instead."""
    c = replace(config, steps=0) if config.analysis != "none" else config
    join_processes(c)
    check_config(c)
    if c.analysis == "signs":
        print("Share of groups of 8 prefixes whose advantage signs are all right; true success rates around 0.5\n"
              "(standard deviation: spread), n continuations sampled from each prefix:")
        return print_table(signs_table(seed=c.seed))
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    data = read_data(c)  # a mistake in a file is told before a folder is made
    out = everyone(open_run(c) if rank() == 0 else None)[0]
    try:
        model, tokenizer, problems, tests, optimizer, state = set_up(c, data, out)
    except UserError:
        if rank() == 0 and not any(out.iterdir()):
            out.rmdir()
        raise
    if c.analysis == "shortcut":
        rows = shortcut_table(model, tokenizer, tests.popitem()[1][:c.prompts_per_step], c)
        for row in rows:
            append(out / "shortcut.jsonl", row)
        return print_table(rows)

    def evaluate_all():
        for name, test in tests.items():
            row = dict(step=state.step, data=name, **evaluate(model, tokenizer, test, c))
            append(out / "metrics.jsonl", row)
            tqdm.write("step {step:4d}  accuracy on {data}: {accuracy:.3f} (avg@{samples})  {best:.3f} (pass@{samples})"
                       "  {majority:.3f} (maj@{samples})".format(**row, best=row["pass_at"][row["samples"]]))

    if state.step == 0 and c.eval_every or not c.steps:
        evaluate_all()
    bad, reading, line = 0, [], (
        "step {step:4d}  reward {reward:+.3f}  value {mc_value:+.3f}  accuracy {accuracy:.3f}  "
        "segment {segment_tokens:.1f}  response {response_tokens:.1f}  zero-advantage {zero_advantage:.2f}  "
        "{tokens_per_second:.0f} tokens/s")
    LOOP.append(True)
    with tqdm(total=c.steps, initial=state.step, desc=c.algo, disable=rank() > 0 or None, leave=False) as bar:
        while state.step < c.steps:
            state.step += 1
            row, reading = training_step(model, tokenizer, optimizer, problems, state, c)
            append(out / "metrics.jsonl", row)
            for r in reading:
                append(out / "samples.jsonl", r)
            bad = bad + 1 if row["skipped"] else 0
            if bad == 3:
                raise UserError(f"stopped at step {state.step}: gradient not finite in 3 steps in a row; lower --lr")
            if state.step % max(1, c.steps // 20) == 0 or state.step == 1:
                tqdm.write(line.format(**row))
            if c.eval_every and (state.step % c.eval_every == 0 or state.step == c.steps):
                evaluate_all()
            if STOP or c.save_every and (state.step % c.save_every == 0 or state.step == c.steps):
                save_checkpoint(out, model, optimizer, state)
            bar.update()
            if STOP and state.step < c.steps:
                tqdm.write(f"stopped after step {state.step}; go on with: python skpo.py --resume --out {out}")
                sys.exit(130)
    if c.steps:
        weights = get_model_state_dict(model, options=WHOLE)
        if rank() == 0:
            model.save_pretrained(out / "model", state_dict=weights)
            tokenizer.save_pretrained(out / "model")
            summarise(out, reading)
    return out


def summarise(out, reading):
    """The end of a run on screen: accuracy before and after, one rollout, the files, the reward as a line."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
    for name in dict.fromkeys(r["data"] for r in rows if "data" in r):
        scores = [r for r in rows if r.get("data") == name]
        first = f"at step {scores[0]['step']}" if scores[0]["step"] else "before"
        print(f"\naccuracy on {name}: {scores[0]['accuracy']:.3f} {first}, {scores[-1]['accuracy']:.3f} after "
              f"(avg@{scores[0]['samples']}, {scores[0]['problems']} problems)")
    if reading:
        cut = lambda text: (text if len(text) < 160 else f"{text[:100]} ... {text[-50:]}").replace("\n", "\\n")
        print(f"\nproblem   {cut(reading[0]['question'])}   answer {reading[0]['answer']}")
        if reading[0]["segment"]:
            print(f"segment   {cut(reading[0]['segment'])}   value {reading[0]['value']:+.2f}")
        for response in reading[0]["responses"][:4]:
            print(f"response  {cut(response['text'])}   reward {response['reward']:+.0f}")
    rewards = np.array([r["reward"] for r in rows if "reward" in r])
    if all(r.get("grad_norm", 0) == 0 for r in rows):
        print("\nNothing was learned: all rewards were alike. Take easier problems or a stronger model.")
    curve = [mean(part) for part in np.array_split(rewards, min(60, len(rewards)))]
    low, high = min(curve), max(curve)
    bars = "".join("▁▂▃▄▅▆▇█"[int(7.99 * (v - low) / (high - low or 1))] for v in curve)
    print(f"\nreward    {bars}  {curve[0]:+.2f} to {curve[-1]:+.2f}\nfiles     {out}: config.json, metrics.jsonl, "
          f"samples.jsonl, model/ (python skpo.py --model {out / 'model'} ...)")


# ---- Command line ---------------------------------------------------------------------------------------------------

def parse_config(argv):
    """The command line as a Config. The embedded model and a run that is resumed bring defaults of their own."""
    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def complain(message):
        raise UserError(message)
    parser = HfArgumentParser(Config, description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.error = complain
    first, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{f.name}" for f in fields(Config)]
        near = difflib.get_close_matches("--" + unknown[0].split("=")[0].strip("-").replace("-", "_"), flags, 1, 0.7)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise UserError(f"there is no {unknown[0]}; {hint}")
    if first.resume and first.out and (Path(first.out) / "config.json").is_file():
        try:
            saved = dict(json.loads((Path(first.out) / "config.json").read_text()))
        except ValueError as error:
            raise UserError(f"cannot read {Path(first.out) / 'config.json'}: {brief(error)}") from None
        parser.set_defaults(**{f.name: saved[f.name] for f in fields(Config) if f.name in saved} | dict(resume=True))
    elif first.model == "embedded":
        parser.set_defaults(**EMBEDDED)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]


def interrupt(number, frame):
    """The first signal lets the step in progress end and be saved; a second, or one before any step, does not."""
    if STOP or not LOOP:
        raise KeyboardInterrupt
    STOP.append(number)
    print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)


def main(argv=None):
    """Runs; every mistake of the user's ends in one line and an exit code that is not 0."""
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        if "LOCAL_RANK" not in os.environ:  # torchrun stops all at once
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, interrupt)
        train(config)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        sys.exit(f"skpo.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit("skpo.py: out of memory: in sampling, set --cache_tokens; in the update, a smaller --micro_tokens "
                 f"({brief(error)})")
    except OSError as error:
        sys.exit(f"skpo.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
