# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers>=5,<6", "numpy", "sympy"]
# ///
r"""SKPO, Skip-Connected Policy Optimization (Teng et al., arXiv 2604.08690), in one file.

    python skpo.py                                        # embedded tiny model and task, on a CPU
    python skpo.py --model Qwen2.5-0.5B --data train.jsonl --eval_data test.jsonl
    torchrun --standalone --nproc_per_node 8 skpo.py ...  # several GPUs

What differs from GRPO:
1. Before the responses a segment s is sampled from the prompt q: reasoning that pauses early.
2. It is put AHEAD of the prompt. The G responses are sampled from [s, q], each one complete.
3. Their mean reward is the Monte Carlo value of s, R_I. It costs no further samples.
4. They are trained on their advantage within the group (eq. 5), as in GRPO, but a clipped token
   keeps its gradient: the clipped ratio is a constant.
5. s is trained, by PPO's clip (eq. 6), on R_I - V(q), where V(q) is a running value of the prompt
   (SPO: Xu & Ding, arXiv 2509.13232).

One rollout of the embedded task, which is to add six digits modulo 10:

    q       598183=          the prompt
    s       54               sampled from q, paused after t_q = 2 tokens (eq. 2)
    [s, q]  54598183=        the skip-connected prompt
    o_i     542314\boxed{4}  one of G = 8 responses from there: right, R_II = +1
    R_I     -0.25            the mean of R_II: three of the eight were right (eq. 3)

Read `collect` first. Its comments number the steps of one training step; the numbers are ours.
`learn` is step 10. Where the paper leaves a choice open, the line or the docstring that makes it
says "paper silent". The paper's single pass over one KV cache is two rollouts here: s moves ahead
of q, every position changes, and so the cache of the segments cannot be used again. Within each
rollout a prompt is run once, and its cache is copied to each of its samples.
"""
import argparse
import ast
import inspect
import json
import math
import numbers
import os
import random
import re
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

# Otherwise a growing KV cache fragments the memory of a GPU.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import numpy as np
import sympy
import tokenizers
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch.distributed.checkpoint import state_dict as state_dict_api
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers import LogitsProcessor, LogitsProcessorList
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import find_adapter_config_file

# What every progress bar has in common: only the first process shows it, and only on a terminal.
OTHER_PROCESS = os.environ.get("RANK", "0") != "0"
BAR = dict(leave=False, disable=OTHER_PROCESS or None)  # None: tqdm looks for a terminal itself


# ---- 1. Config (Appendix C), and the records that the functions hand on -------------------------
Ablation = Literal["none", "no_skip", "no_mc", "fixed_split", "extreme_selection"]

@dataclass
class Config:
    """Every knob; those of training have the paper's values. The comment beside it is its --help.
    """
    model: str = "embedded"  # transformers folder or hub name; "embedded": a tiny one, built here
    data: str = ""  # JSON lines to train on, or "sums", "arithmetic"; "": built-in problems
    eval_data: str = ""  # JSON lines to evaluate on, several with commas; "": held-out ones of data
    out: str = ""  # folder of this run; "": a new one under runs/
    algo: Literal["skpo", "grpo"] = "skpo"  # grpo: the paper's baseline, no upstream
    ablation: Ablation = "none"  # a row of the paper's Table 2
    steps: int = 500  # training steps; 0: evaluation alone
    prompts_per_step: int = 128  # B, prompts in a step
    minibatches: int = 4  # optimiser steps in a training step, each on B / minibatches prompts
    group_size: int = 8  # G, samples of each prompt
    max_prompt_tokens: int = 1024  # problems with longer prompts are dropped
    max_new_tokens: int = 3072  # limit of a response, tokens
    temperature: float = 1.0  # the policy is softmax(logits / temperature), to sample and to train
    lr: float = 1e-6  # of AdamW, after the warm-up
    warmup_steps: int = 10  # training steps of linear warm-up, constant after them
    weight_decay: float = 0.1  # of AdamW; its betas are 0.9 and 0.999
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    clip_low: float = 0.2  # ratios are clipped at 1 - this; upstream and with grpo at 1 + this too
    clip_high: float = 0.28  # downstream ratios are clipped at 1 + this (Clip-Higher)
    w_up: float = 0.5  # weight of the upstream loss (eq. 4), skpo only; in small runs try 0 or 0.1
    w_down: float = 0.5  # weight of the downstream loss (eq. 4), skpo only
    split_low: float = 1 / 6  # t_q is drawn between split_low * L_q ...
    split_high: float = 1 / 2  # ... and split_high * L_q
    init_length: float = 1024  # L_q of a prompt not seen yet, tokens; lower it with max_new_tokens
    rho_min: float = 0.875  # trackers: least rho, after a large move of the policy
    rho_max: float = 0.96  # trackers: largest rho, after a small one
    tau: float = 8.0  # trackers: rho is 2^(-D / tau), clipped; D, how far the policy moved, in nats
    explore_eps: float = 0.05  # added to the weight with which a prompt is drawn
    template: Literal["auto", "none"] = "auto"  # auto: ask for a box, in the chat template if any
    micro_tokens: int = 4096 if torch.cuda.is_available() else 1024  # tokens in a training pass
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; auto: bfloat16 on a GPU
    seed: int = 0  # on the same CPU the same seed gives the same numbers; on a GPU it may not
    eval_every: int = 50  # steps between evaluations; one comes first and one last; 0: none
    eval_samples: int = 4  # k of avg@k and pass@k: samples of each evaluation problem
    eval_problems: int = 0  # how many of each evaluation set are used; 0: all
    save_every: int = 50  # steps between checkpoints, one comes after the last step; 0: only that
    resume: bool = False  # go on with the run in --out from its last checkpoint

# Defaults that replace the paper's: EMBEDDED for the embedded model, SMALL for any other without a
# GPU. They have smaller sizes and a larger lr.
EMBEDDED = dict(
    steps=100,
    prompts_per_step=32,
    max_new_tokens=24,
    lr=3e-4,
    init_length=10,
)
SMALL = dict(
    steps=20,
    prompts_per_step=8,
    minibatches=2,
    group_size=4,
    max_new_tokens=128,
    lr=1e-5,
    init_length=64,
    eval_every=10,
    eval_samples=1,
    eval_problems=16,
    save_every=10,
)

@dataclass
class Problem:
    """A question, its reference answer and, once it is tokenised, the ids of its prompt."""
    question: str
    answer: str
    ids: list = None
    row: dict = field(default_factory=dict)  # the further fields of its data line

@dataclass(frozen=True)
class Sample:
    """What the model drew after a prompt. It never changes."""
    tokens: list  # ids, EOS included
    logprobs: list  # nats, log pi_old of each token, as it was sampled
    finished: bool  # the last token is an EOS
    prompt: list  # ids of what it follows: q, or [s, q]

@dataclass(frozen=True)
class Row:
    """A Sample's part in the loss (eq. 4), made in step 9."""
    sample: Sample
    advantage: float
    weight: float  # of each of its tokens in the loss, w_up or w_down included
    ppo_clip: bool  # trained by eq. 6, else by eq. 5

class UserError(Exception):
    """A mistake of the user's: shown as one line that says what to do, without a traceback."""


# ---- 2. Upstream (Section 3.1): split, cut, select; the skip connection --------------------------
def split_position(length, rng, low=1 / 6, high=1 / 2):
    """Where an upstream segment pauses (eq. 2): t_q ~ Uniform[low * L_q, high * L_q].

    length: L_q, tokens; rng: NumPy's or random's. -> int, tokens, at least 1."""
    t_q = rng.uniform(low * length, high * length)
    return max(1, round(t_q))

def cut_segment(sample):
    """A segment that ended before its pause is cut to half of its length (Section 3.1).

    paper silent: EOS is not counted, but a segment of EOS alone keeps it; one whose last token
    before the pause is EOS has ended, too. -> Sample."""
    if not sample.finished:
        return sample
    length = len(sample.tokens) - 1  # without EOS
    half = max(1, length // 2)
    return Sample(sample.tokens[:half], sample.logprobs[:half], False, sample.prompt)

def select_segment(logprobs, statistic=np.median):
    """Which segment is kept, the one of median surprise (Section 3.1):
    d(s) = mean_t -log pi(s_t | q, s_<t).

    logprobs: G lists of nats; statistic: np.median, or np.min and np.max for an ablation.
    -> index of the d nearest to statistic(d). paper silent: the first one on a tie."""
    d = np.array([-np.mean(segment) for segment in logprobs])  # [G], nats per token
    gap = np.abs(d - statistic(d))
    gap = gap.round(9)  # with an even G the two middle ones are equally near, but for rounding
    return int(gap.argmin())

def skip_prompt(segment, prompt, bos_token_id=None):
    """The skip connection (Section 3.1): [s, q], the segment FIRST, then the whole prompt.

    Lists of ids, joined as they are. paper silent: a BOS that opens q, and stands in it once, moves
    to the very front. (SmolLM2's BOS opens every turn, and stays where it is.) -> list of ids."""
    opens = prompt[0] == bos_token_id and prompt.count(bos_token_id) == 1
    front = prompt[:1] if opens else []
    rest = prompt[len(front):]
    return front + segment + rest


# ---- 3. Values and trackers (Sections 3.1, 3.2; SPO); the choice of prompts ----------------------
def monte_carlo_value(rewards):
    """The value of a segment from the rewards of the responses that follow it (eq. 3):
    R_I(s, a) = mean_i R_II(o_i, a).

    rewards: [B, G] in [-1, 1]. -> [B] in [-1, 1], float64."""
    return torch.as_tensor(rewards).double().mean(-1)

class Tracker:
    """A running mean per prompt (SPO eq. 5 to 7), one for V(q) in [-1, 1], one for L_q in tokens:
    x <- x + eta (observation - x), eta = 1 / (rho N + 1), N <- rho N + 1. It forgets faster the
    further the policy moved.

    value: [size], x; count: [size], N, which is 0 for a prompt not seen yet."""

    def __init__(self, size, initial, rho_min=0.875, rho_max=0.96, tau=8.0):
        self.value = np.full(size, float(initial))
        self.count = np.zeros(size)
        self.rho_min = rho_min
        self.rho_max = rho_max
        self.tau = tau

    def update(self, indices, observations, divergences):
        """Takes in one observation per prompt. indices: [B], distinct; observations: [B];
        divergences: [B] or one number, D since the prompt's last visit, nats. With tau = 8 nats rho
        is rho_max at nearly every visit: a memory of some 25 observations."""
        rho = 2.0 ** (-np.asarray(divergences) / self.tau)
        rho = rho.clip(self.rho_min, self.rho_max)
        N = self.count[indices]
        x = self.value[indices]
        eta = 1 / (rho * N + 1)  # 1 at the first visit, which replaces the initial value
        self.value[indices] = x + eta * (np.asarray(observations, float) - x)
        self.count[indices] = rho * N + 1

def choose_prompts(values, n, rng, eps=0.05):
    """n distinct prompts, those of middling value most often (SPO eq. 11): weight
    sqrt(v (1 - v)) + eps with v = (1 + V) / 2.

    values: [size] in [-1, 1]. -> [n] indices."""
    variance = (1 - values**2) / 4  # v (1 - v)
    weight = np.sqrt(variance.clip(0)) + eps
    p = weight / weight.sum()
    return rng.choice(len(values), n, replace=False, p=p)


# ---- 4. Advantages and losses (Section 3.2) ------------------------------------------------------
def group_advantages(rewards):
    """Downstream: A_i = (R_i - mean R) / std R within each group, 0 where all its R are equal.

    [..., G] -> [..., G], float64. paper silent: the population's std, without an epsilon."""
    R = torch.as_tensor(rewards).double()
    mean = R.mean(-1, keepdim=True)
    std = R.std(-1, correction=0, keepdim=True)
    equal = std < 1e-9  # rounding leaves a little
    return torch.where(equal, 0.0, (R - mean) / std)

def upstream_advantages(mc_values, baselines):
    """Upstream: A = R_I - V(q), normalised over the batch (SPO).

    mc_values: R_I, baselines: V(q), [B] each, in [-1, 1]. -> [B], float64."""
    A = torch.as_tensor(mc_values).double() - torch.as_tensor(baselines)
    return group_advantages(A)  # the batch is the group

def downstream_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.28):
    """-J_down (eq. 5): -sum w sg(clip(r, 1 - low, 1 + high)) A log pi(o_t | [s, q], o_<t). The
    clipped importance ratio r = pi / pi_old is a constant (sg): every token keeps a gradient.

    logprobs, old_logprobs: [N, T], nats; advantages: [N]; weights: [N, T], those of `Row`:
    w_down / (tokens of the prompt's G responses * prompts in the mini-batch), 0 where padded.
    -> scalar. It is a sum, so that the losses of passes add up to that of their mini-batch."""
    A = advantages[:, None]  # [N, 1]
    ratio = (logprobs.detach() - old_logprobs).exp()  # [N, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = weights * clipped * A * logprobs
    return -objective.sum()

def upstream_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.2):
    """-J_up (eq. 6): -sum w min(r A, clip(r, 1 - low, 1 + high) A), PPO's: a token clipped in its
    advantage's direction loses its gradient.

    Shapes as in `downstream_loss`; weights: w_up / (tokens of the segment * prompts in the
    mini-batch). GRPO's responses are trained by it, too. paper silent: no Clip-Higher here, since
    Appendix C names it downstream."""
    A = advantages[:, None]  # [N, 1]
    ratio = (logprobs - old_logprobs).exp()  # [N, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = weights * torch.minimum(ratio * A, clipped * A)
    return -objective.sum()


# ---- 5. Collect: a training step up to its loss, in the order of Section 3 -----------------------
@dataclass
class State:
    """What a run carries from step to step, beside the weights and the optimiser."""
    values: Tracker  # V(q), in [-1, 1]
    lengths: Tracker  # L_q, tokens
    kept: dict  # index of a problem -> the segment (Sample) kept at its last visit
    step: int = 0

def initial_state(size, config):
    """The State before the first step. size: how many problems there are to train on."""
    c = config
    values = Tracker(size, 0.0, c.rho_min, c.rho_max, c.tau)
    lengths = Tracker(size, c.init_length, c.rho_min, c.rho_max, c.tau)
    return State(values, lengths, {})

def collect(model, tokenizer, problems, state, config, reward):
    """Steps 1 to 9 and 11 on B prompts: no gradient, no optimiser.

    problems: Problems with the ids of their prompts; state: its step seeds the draws, its trackers
    and kept segments are brought up to date; reward: reward(response, problem) -> float in [-1, 1],
    such as `math_reward`.
    -> rows: [B] lists of 1 + G Rows, the segment's first, for `learn`;
       rollouts: [B] dicts, what was sampled and how it was graded (`rollout_records`);
       metrics: dict, for metrics.jsonl (`response_metrics`); also mc_value, the mean R_I;
       segment_tokens, the mean length of s; tokens, all that were sampled."""
    c = config
    odd = state.step % 2 == 1  # two ablations alternate
    rng = seed_generators(c.seed, state.step)

    # 1. Choose B distinct prompts. V is read here: step 8 wants the value from before step 11.
    chosen = choose_prompts(state.values.value, c.prompts_per_step, rng, c.explore_eps)  # [B]
    q = [problems[i] for i in chosen]  # [B] Problems
    prompts = [problem.ids for problem in q]  # [B] lists of ids
    V = state.values.value[chosen]  # [B]
    L = state.lengths.value[chosen]  # [B], tokens

    # 2. Upstream, phase I: G segments per prompt, each paused at t_q (eq. 2).
    low, high = c.split_low, c.split_high
    if c.ablation == "fixed_split":  # Table 2: the far end on odd steps, the near one on even
        low = high = c.split_high if odd else c.split_low
    t_q = [split_position(L_q, rng, low, high) for L_q in L]  # [B], tokens
    t_q = np.minimum(t_q, c.max_new_tokens)
    drawn = distributed_generate(model, tokenizer, prompts, c.group_size, t_q, c)  # [B][G] Samples

    # 3. Keep the segment of median surprise; the others are dropped.
    statistic = np.median
    if c.ablation == "extreme_selection":  # Table 2: least likely on odd steps, likeliest on even
        statistic = np.max if odd else np.min
    segments = []  # [B] Samples
    uncut = []  # [B] Samples, the same as they were drawn
    for group in drawn:
        cut = [cut_segment(s) for s in group]
        index = select_segment([s.logprobs for s in cut], statistic)
        segments.append(cut[index])
        uncut.append(group[index])

    # 4. The skip connection: the segment first, then the prompt.
    bos = tokenizer.bos_token_id
    down_prompts = [skip_prompt(s.tokens, s.prompt, bos) for s in segments]  # [s, q]: [B]
    limits = c.max_new_tokens
    if c.ablation == "no_skip":  # Table 2: go on after [q, s]. paper silent: s + o share the limit
        down_prompts = [s.prompt + s.tokens for s in segments]
        limits = [max(1, c.max_new_tokens - len(s.tokens)) for s in segments]

    # 5. Downstream, phase II: G complete responses. paper silent: each gets the full limit after
    # [s, q], and its length is measured without s (but with it in no_skip).
    responses = distributed_generate(  # [B][G] Samples
        model, tokenizer, down_prompts, c.group_size, limits, c)

    # 6. Rewards, and the Monte Carlo value of the segment (eq. 3).
    complete = [token_lists(group) for group in responses]  # [B][G] lists of ids
    if c.ablation == "no_skip":
        complete = [token_lists(group, s.tokens) for s, group in zip(segments, responses)]
    texts, R_II = grade(tokenizer, q, complete, reward)  # [B][G], [B, G]
    R_I = monte_carlo_value(R_II)  # [B]
    tokens = count_tokens(drawn) + count_tokens(responses)
    if c.ablation == "no_mc":  # Table 2: the outcome of the segment's own continuation
        R_I, further = own_outcomes(model, tokenizer, q, segments, uncut, c, reward)  # [B]
        tokens += further

    # 7. Downstream advantages.
    A_II = group_advantages(R_II)  # [B, G]

    # 8. Upstream advantages. At a first visit V(q) is 0, so A is R_I. Once most first visits
    # succeed, the batch's mean is well above 0. A prompt that is solved once more has R_I near
    # V(q); with the mean subtracted its A is negative, and a good segment is made less likely. In
    # small runs this does harm: see "First visits" in the README.
    A_I = upstream_advantages(R_I, V)  # [B]

    # 9. The loss (eq. 4) is a mean over tokens, then over the prompts of a mini-batch.
    # paper silent: eq. 5 is read as written, a mean over the tokens of a group; Appendix C's
    # "tokens contribute equally" could be one over the tokens of the mini-batch. EOS counts.
    prompt_weight = c.minibatches / c.prompts_per_step  # 1 / (prompts in a mini-batch)
    rows = []  # [B] lists of 1 + G Rows
    for s, group, A_s, A_group in zip(segments, responses, A_I.tolist(), A_II.tolist()):
        weight_up = c.w_up * prompt_weight / len(s.tokens)
        weight_down = c.w_down * prompt_weight / count_tokens([group])
        group_rows = [Row(s, A_s, weight_up, ppo_clip=True)]  # eq. 6
        for o, A in zip(group, A_group):
            group_rows.append(Row(o, A, weight_down, ppo_clip=False))  # eq. 5
        rows.append(group_rows)

    # 11. Trackers. They come before step 10: D compares with the policy that sampled this step,
    # which step 10 moves, and nothing in step 10 reads them.
    D = np.zeros(len(chosen))  # [B], nats; 0 at a first visit
    seen = [b for b, i in enumerate(chosen) if i in state.kept]
    if seen:
        D[seen] = policy_drift(model, [state.kept[chosen[b]] for b in seen], c)
    lengths = np.array([[len(ids) for ids in group] for group in complete])  # [B, G], tokens
    state.values.update(chosen, R_I.numpy(), D)
    state.lengths.update(chosen, lengths.mean(1), D)
    state.kept.update(zip(chosen.tolist(), segments))

    rollouts = rollout_records(tokenizer, chosen, q, responses, texts, R_II, A_II)  # [B] dicts
    for record, s, value, A in zip(rollouts, segments, R_I.tolist(), A_I.tolist()):
        record["segment"] = tokenizer.decode(s.tokens)
        record["value"] = value
        record["advantage"] = A
    metrics = response_metrics(responses, lengths, R_II, A_II)
    metrics["mc_value"] = R_I.mean().item()
    metrics["segment_tokens"] = np.mean([len(s.tokens) for s in segments])
    metrics["tokens"] = tokens
    return rows, rollouts, metrics

def collect_grpo(model, tokenizer, problems, state, config, reward):
    """GRPO as published (Shao et al. 2024), the paper's baseline: G responses from q, the group's
    advantages, PPO's clip at 1 +- clip_low (the form of eq. 6), a mean over the tokens of a
    response, then over responses, no KL. Takes what `collect` does, and returns the same but for
    the segments and their metrics.

    paper silent: prompts are chosen as for SKPO, with D = 0."""
    c = config
    rng = seed_generators(c.seed, state.step)
    chosen = choose_prompts(state.values.value, c.prompts_per_step, rng, c.explore_eps)  # [B]
    q = [problems[i] for i in chosen]  # [B] Problems
    prompts = [problem.ids for problem in q]  # [B] lists of ids
    limit = c.max_new_tokens
    responses = distributed_generate(model, tokenizer, prompts, c.group_size, limit, c)  # [B][G]
    complete = [token_lists(group) for group in responses]  # [B][G] lists of ids
    texts, R = grade(tokenizer, q, complete, reward)  # [B][G], [B, G]
    A = group_advantages(R)  # [B, G]
    state.values.update(chosen, R.mean(1).numpy(), 0.0)

    prompt_weight = c.minibatches / c.prompts_per_step  # 1 / (prompts in a mini-batch)
    response_weight = prompt_weight / c.group_size
    rows = []  # [B] lists of G Rows
    for group, A_group in zip(responses, A.tolist()):
        group_rows = []
        for o, advantage in zip(group, A_group):
            weight = response_weight / len(o.tokens)
            group_rows.append(Row(o, advantage, weight, ppo_clip=True))
        rows.append(group_rows)
    rollouts = rollout_records(tokenizer, chosen, q, responses, texts, R, A)  # [B] dicts
    lengths = np.array([[len(o.tokens) for o in group] for group in responses])  # [B, G], tokens
    metrics = response_metrics(responses, lengths, R, A)
    metrics["tokens"] = count_tokens(responses)
    return rows, rollouts, metrics

def own_outcomes(model, tokenizer, problems, segments, uncut, config, reward):
    """What no_mc takes for R_I: the outcome of one continuation from [q, s]. segments, uncut: B
    Samples.

    paper silent: a segment that had ended by itself is its own continuation, uncut; V(q) follows
    these outcomes, too; the continuation has the full limit.
    -> outcomes [B]; how many tokens were sampled for them."""
    paused = [s for s, whole in zip(segments, uncut) if not whole.finished]
    prompts = [s.prompt + s.tokens for s in paused]  # [q, s]
    limit = config.max_new_tokens
    onward = distributed_generate(model, tokenizer, prompts, 1, limit, config)  # [P][1] Samples
    continuations = [token_lists(group, s.tokens) for s, group in zip(paused, onward)]  # [P][1]
    complete = []  # [B][1] lists of ids
    for whole in uncut:
        if whole.finished:
            complete.append([whole.tokens])
        else:
            complete.append(continuations.pop(0))
    _, outcomes = grade(tokenizer, problems, complete, reward)  # [B, 1]
    return outcomes[:, 0], count_tokens(onward)

@torch.no_grad()
def policy_drift(model, segments, config):
    """D, how far pi moved since it last acted on each prompt: mean_t |log pi_then - log pi_now| of
    the segment kept then. segments: N Samples. -> [N], nats.

    paper silent: after SPO's code, but on s alone (SPO: the whole response), before the update
    (SPO: after it), and with tau = 8 nats (SPO: D_half = 0.06)."""
    D = torch.zeros(len(segments), device=model.device)  # other processes add theirs
    for indices in micro_batches(segments, config.micro_tokens):
        if not indices:
            continue
        batch = [segments[i] for i in indices]
        logprobs, old_logprobs, mask = new_and_old_logprobs(model, batch, config.temperature)
        D[indices] = (logprobs - old_logprobs).abs().sum(1) / mask.sum(1)
    dist.all_reduce(D)
    return D.cpu().numpy()

def token_lists(group, ahead=()):
    """The ids of each of n Samples, with those of `ahead` before them. -> [n] lists of ids."""
    return [[*ahead, *sample.tokens] for sample in group]

def count_tokens(groups):
    """How many tokens [P][n] Samples have in all."""
    total = 0
    for group in groups:
        total += sum(len(sample.tokens) for sample in group)
    return total

def rollout_records(tokenizer, indices, problems, groups, texts, rewards, advantages):
    """What was sampled for each of P problems and how it was graded, in text and plain numbers, for
    the screen, rollouts.jsonl and analyses.

    indices: [P], of the problems; groups: [P][n] Samples; texts: [P][n]; rewards, advantages:
    [P, n]. -> [P] dicts, to which `collect` adds the segment's text, value R_I and advantage."""
    records = []
    for p, problem in enumerate(problems):
        responses = []
        for o, text, R, A in zip(groups[p], texts[p], rewards[p].tolist(), advantages[p].tolist()):
            response = dict(text=text, reward=R, advantage=A, truncated=not o.finished)
            responses.append(response)
        record = dict(problem=int(indices[p]), prompt=tokenizer.decode(problem.ids))
        record |= dict(segment=None, value=None, advantage=None, responses=responses)
        records.append(record)
    return records

def response_metrics(responses, lengths, rewards, advantages):
    """The metrics of the responses: [B][G] Samples; lengths, rewards, advantages: [B, G]. -> dict

    zero_advantage: the share of prompts whose G advantages are all 0, which teach nothing.
    entropy: of the policy that sampled, nats, the mean of -log pi over the tokens."""
    logprobs = []
    finished = []
    for group in responses:
        for o in group:
            logprobs += o.logprobs
            finished.append(o.finished)
    return dict(
        reward=rewards.mean().item(),
        zero_advantage=(advantages == 0).all(1).double().mean().item(),
        response_tokens=lengths.mean(),
        truncated=1 - np.mean(finished),
        entropy=-np.mean(logprobs),
    )


# ---- 6. Learn: step 10, one optimiser step per mini-batch, cut into passes -----------------------
def learn(model, optimizer, rows, config):
    """Step 10: one optimiser step on each mini-batch of B / minibatches prompts. The caller sets
    the optimiser's lr and weight decay. rows: [B] lists of Rows. -> metrics, a dict:

    ratio_up, clip_up: mean importance ratio of the tokens trained by eq. 6, and the share of them
    whose ratio is clipped, whatever the advantage's sign; ratio_down, clip_down: of those trained
    by eq. 5. With GRPO the responses are trained by eq. 6. None where nothing was trained.
    grad_norm: the gradient's norm before it is scaled down, mean over the mini-batches."""
    size = len(rows) // config.minibatches  # prompts
    norms = []
    sums = torch.zeros(2, 3)  # of eq. 6, of eq. 5: tokens, the sum of ratios, clipped tokens
    for first in range(0, len(rows), size):
        batch = []
        for group in rows[first:first + size]:
            batch += group
        norm, ratios = optimizer_step(model, optimizer, batch, config)
        norms.append(norm)
        sums += ratios
    metrics = dict(grad_norm=np.mean(norms))
    for phase, (tokens, ratios, clipped) in zip(("up", "down"), sums.tolist()):
        metrics[f"ratio_{phase}"] = ratios / tokens if tokens else None
        metrics[f"clip_{phase}"] = clipped / tokens if tokens else None
    return metrics

def optimizer_step(model, optimizer, rows, config):
    """One step of the optimiser on the Rows of a mini-batch, cut into passes (micro-batches) whose
    gradients add up. What has no advantage or no weight has no gradient and is not run.

    paper silent: with no advantage at all nothing moves, because AdamW skips weights that have no
    gradient. -> the gradient's norm before it is scaled down; ratios [2, 3] as in `pass_loss`,
    summed over the passes."""
    rows = [row for row in rows if row.advantage and row.weight]
    samples = [row.sample for row in rows]
    ratios = torch.zeros(2, 3, device=model.device)
    for indices in tqdm(micro_batches(samples, config.micro_tokens), "passes", **BAR):
        batch = [rows[i] for i in indices]
        if not batch:  # this process is idle, but takes part in the sum of the gradients
            batch = [replace(rows[-1], weight=0.0)]
        loss, sums = pass_loss(model, batch, config)
        loss.backward()
        ratios += sums
    dist.all_reduce(ratios)
    # Under FSDP (`shard`) the optimiser holds the float32 masters, and model.parameters() are their
    # compute copies.
    masters = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(masters, config.max_grad_norm).item()
    if not math.isfinite(norm):
        raise UserError("the gradient is not a finite number: --resume with a lower --lr")
    optimizer.step()
    optimizer.zero_grad()
    reshard(model)  # drops the compute copies, which are stale
    unshard(model)  # copies the masters anew
    return norm, ratios.cpu()

def pass_loss(model, rows, config):
    """The loss of a pass (eq. 4), the sum of both phases'; w_up and w_down are in the weights.
    -> loss, scalar; ratios [2, 3]: of eq. 6's tokens, then of eq. 5's, what `ratio_sums` gives."""
    c = config
    samples = [row.sample for row in rows]
    new, old, mask = new_and_old_logprobs(model, samples, c.temperature)  # [N, T] each
    A = new.new_tensor([row.advantage for row in rows])  # [N]
    weight = new.new_tensor([row.weight for row in rows])  # [N]
    weights = weight[:, None] * mask  # [N, T]
    ppo_clip = mask.new_tensor([row.ppo_clip for row in rows])  # [N]
    weights_up = weights * ppo_clip[:, None]  # [N, T]
    weights_down = weights * ~ppo_clip[:, None]  # [N, T]

    loss_up = upstream_loss(new, old, A, weights_up, c.clip_low, c.clip_low)
    ratios_up = ratio_sums(new, old, weights_up, c.clip_low, c.clip_low)  # [3]
    loss_down = downstream_loss(new, old, A, weights_down, c.clip_low, c.clip_high)
    ratios_down = ratio_sums(new, old, weights_down, c.clip_low, c.clip_high)  # [3]
    return loss_up + loss_down, torch.stack([ratios_up, ratios_down])

def ratio_sums(logprobs, old_logprobs, weights, clip_low, clip_high):
    """Of the tokens that have a weight: how many they are, the sum of their importance ratios, and
    how many ratios are beyond the clip. [N, T] each. -> [3]."""
    trained = weights > 0
    ratio = (logprobs.detach() - old_logprobs).exp()[trained]  # [tokens]
    clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    return torch.stack([trained.sum(), ratio.sum(), clipped.sum()])

def new_and_old_logprobs(model, samples, temperature):
    """log pi of the tokens of N Samples, with gradients, and log pi_old, as they were sampled.
    -> new, old, mask: [N, T] each, nats, 0 where padded."""
    prompts = [sample.prompt for sample in samples]
    tokens = [sample.tokens for sample in samples]
    new, mask = response_logprobs(model, prompts, tokens, temperature)  # [N, T] each
    old = torch.zeros_like(new)
    for i, sample in enumerate(samples):
        old[i, :len(sample.tokens)] = new.new_tensor(sample.logprobs)
    return new, old, mask

def micro_batches(samples, limit):
    """Cuts N Samples into passes of at most `limit` tokens (`padded_tokens`); a longer one goes
    alone. -> this process's passes, lists of indices.

    Every process must take the same number of passes, because FSDP sums their gradients pass by
    pass: where they do not divide evenly, some get an empty one."""
    # Sorted by length class, a factor of sqrt 2 wide, and then by prompt, so that equal prompts
    # meet in a pass and are run once.
    order = []
    for i, sample in enumerate(samples):
        length_class = round(2 * math.log2(len(sample.tokens)))
        order.append((length_class, sample.prompt, i))
    passes = []
    for _, _, i in sorted(order):
        fits = False
        if passes:
            grown = [samples[j] for j in [*passes[-1], i]]
            fits = padded_tokens(grown) <= limit
        if not fits:
            passes.append([])
        passes[-1].append(i)
    rank, world = rank_and_world()
    while len(passes) % world:
        passes.append([])
    return passes[rank::world]

def padded_tokens(samples):
    """How many tokens a pass over Samples runs. Padding counts; a prompt that several share counts
    once."""
    prompts = {tuple(sample.prompt) for sample in samples}
    longest_prompt = max(len(prompt) for prompt in prompts)
    longest = max(len(sample.tokens) for sample in samples)
    return len(prompts) * longest_prompt + len(samples) * longest


# ---- 7. Sampling ---------------------------------------------------------------------------------
CHUNK = 16  # tokens sampled between two looks at which rows are done
PREFILL = 8192  # tokens that a prefill runs at once; more are not faster and need more memory
# transformers 5.24 renames the argument that takes a KV cache.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"

@dataclass
class SamplingRow:
    """A sample that is still being drawn."""
    prompt: list  # ids
    limit: int  # tokens that it may have
    tokens: list = field(default_factory=list)  # ids so far
    logprobs: list = field(default_factory=list)  # nats, of each
    finished: bool = False  # the last token is an EOS

    @property
    def done(self):
        """Whether nothing more is to be drawn: an EOS was, or the limit is met."""
        return self.finished or len(self.tokens) >= self.limit

    def take(self, tokens, logprobs, eos):
        """Appends what was drawn, until the row is done. eos: the set of ids that end a sample."""
        for token, logprob in zip(tokens, logprobs):
            if self.done:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.finished = token in eos

@torch.no_grad()
def generate(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0):
    """n samples of each of P prompts (lists of ids) from softmax(logits / temperature) and nothing
    else. temperature 0 is greedy, with the log-probs of temperature 1. max_new_tokens: one number,
    or one per prompt. -> [P][n] Samples.

    Rows stand in a queue, and a turn samples as many as fit into memory. A decoder call takes about
    as long for few rows as for many, so once half of a turn's rows are done while others wait, the
    rest go to the end of the queue. That costs one more prefill, of prompt and tokens so far."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # inside a peft wrapper, if you use one; adapters included
    limits = np.broadcast_to(max_new_tokens, len(prompts)).tolist()
    rows = []
    for prompt, limit in zip(prompts, limits):
        for _ in range(n):
            rows.append(SamplingRow(prompt, limit))
    eos = eos_ids(model, tokenizer)
    softmax_only = GenerationConfig(
        do_sample=temperature > 0, temperature=1.0, top_k=0, pad_token_id=0,
        eos_token_id=sorted(eos) or None, return_dict_in_generate=True)
    counts = "{desc}: {n} of {total} samples are done [{elapsed}]"
    widest = turn_width(rows) if rows else 0
    queue = list(rows)
    with (generation_config_replaced(model, softmax_only),
          tqdm(total=len(rows), bar_format=counts, **BAR) as bar):
        while queue:
            # turn_width adds the longest row so far to the most that any row may still take. These
            # can be two rows, and their sum more than the context holds. `widest` has room for each
            # row by itself; a row that this cap stops goes back into the queue.
            width = min(widest, turn_width(queue))
            fit = rows_that_fit(model, width)
            turn = queue[:fit]
            queue = queue[fit:]
            sample_turn(model, turn, width, eos, temperature, bool(queue), bar)
            queue += [row for row in turn if not row.done]
    samples = [Sample(row.tokens, row.logprobs, row.finished, row.prompt) for row in rows]
    return [samples[p * n:(p + 1) * n] for p in range(len(prompts))]  # [P][n]

def turn_width(rows):
    """How many columns a turn of these SamplingRows can come to, padding at the left counted: the
    longest of them so far, and the most that any of them may still take."""
    longest = max(len(row.prompt) + len(row.tokens) for row in rows)
    left = max(row.limit - len(row.tokens) for row in rows)
    return longest + left

def eos_ids(model, tokenizer):
    """The set of ids that end a response: the tokenizer's, and those of the generation_config, to
    which `load_model` adds the end of a turn."""
    configured = model.generation_config.eos_token_id  # an id, a list of them, or None
    if not isinstance(configured, list):
        configured = [configured]
    return {tokenizer.eos_token_id, *configured} - {None}

@contextmanager
def generation_config_replaced(model, config):
    """The model's own generation_config steps aside, because its top_k or penalties are not pi.
    Passing another one to transformers' generate is not enough: what it leaves open comes from the
    model's own. That one is put back, also after an error."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own

def sample_turn(model, rows, width, eos, temperature, others_wait, bar):
    """Samples N SamplingRows until all are done or, while others wait, until half of them are; in
    any case no further than `width` columns. Rows that are done leave every CHUNK tokens."""
    bar.set_description_str(f"prefill of {len(rows)} rows")
    fewest = len(rows) // 2 if others_wait else 0
    ids, mask, cache = prefill(model, [row.prompt + row.tokens for row in rows])  # [N, S]
    while len(rows) > fewest and ids.shape[1] < width:
        longest = max(len(row.tokens) for row in rows)
        bar.set_description_str(f"sampling {len(rows)} rows, {longest} tokens so far")
        left = max(row.limit - len(row.tokens) for row in rows)
        count = min(CHUNK, left, width - ids.shape[1])
        tokens, logprobs = draw(model, ids, mask, cache, count, temperature)  # [N, C]
        for row, new, nats in zip(rows, tokens.tolist(), logprobs.tolist()):
            row.take(new, nats, eos)
        staying = [i for i, row in enumerate(rows) if not row.done]
        bar.update(len(rows) - len(staying))
        rows = [rows[i] for i in staying]
        taken = torch.ones_like(tokens, dtype=torch.bool)  # [N, C]; rows that stay took them all
        ids = torch.cat([ids, tokens], 1)[staying]  # [fewer, S + C]
        mask = torch.cat([mask, taken], 1)[staying]  # [fewer, S + C]
        cache.batch_select_indices(staying)

def draw(model, ids, mask, cache, count, temperature):
    """Draws up to `count` tokens after ids [N, S], of which the cache lacks the last. -> tokens
    [N, C] and their log-probs [N, C], nats; after an EOS neither means anything.

    For each token transformers calls the processor with the scores, draws, and calls the stopping
    criterion with the token. Together they keep one log-prob per row and token, and of the scores
    only the latest."""
    scaled = Temperature(temperature or 1.0)
    gathered = DrawnLogprobs(scaled)
    output = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=count, synced_gpus=False,
        logits_processor=LogitsProcessorList([scaled]),
        stopping_criteria=StoppingCriteriaList([gathered]), **{CACHE: cache})
    tokens = output.sequences[:, ids.shape[1]:]  # [N, C]
    logprobs = torch.stack(gathered.logprobs, 1)  # [N, C]
    # On a GPU transformers may notice one step late that all rows have ended; it drops that token.
    return tokens, logprobs[:, :tokens.shape[1]]

class Temperature(LogitsProcessor):
    """Divides the scores [N, V] by the temperature, in place, and holds on to the last ones."""
    def __init__(self, temperature):
        self.temperature = temperature
        self.scores = None  # [N, V], until the next ones

    def __call__(self, input_ids, scores):
        self.scores = scores.div_(self.temperature)
        return self.scores

class DrawnLogprobs(StoppingCriteria):
    """Keeps the log-prob of each token drawn. It stops nothing: it is a stopping criterion because
    transformers calls one after each draw."""
    def __init__(self, scaled):
        self.scaled = scaled
        self.logprobs = []  # [N] each, nats

    def __call__(self, input_ids, scores, **kwargs):
        scaled = self.scaled.scores  # [N, V], which the last column of ids was drawn from
        drawn = scaled.gather(1, input_ids[:, -1:])[:, 0]  # [N]
        self.logprobs.append(drawn - scaled.logsumexp(1))
        return torch.zeros_like(drawn, dtype=torch.bool)

def rows_that_fit(model, length):
    """How many rows of `length` tokens can be sampled at once. A row needs memory for its keys and
    values and, while a token is drawn, for four float32 copies of its logits (measured). What a
    prefill holds in passing is set aside: less than 24 hidden states per token (measured: 12 to
    21). -> int, 1 or more."""
    _, _, cache = prefill(model, [[0, 0]])  # holds one token
    token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    logits_bytes = 4 * 4 * vocabulary
    prefill_bytes = PREFILL * 24 * hidden * cache.layers[0].keys.itemsize
    memory = 4e9  # bytes; a constant on a CPU, so that the same seed gives the same numbers
    if model.device.type == "cuda":
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        memory = 0.7 * (torch.cuda.mem_get_info()[0] + idle)
    row_bytes = token_bytes * (length + CHUNK) + logits_bytes
    return max(1, int((memory - prefill_bytes) // row_bytes))


# ---- 8. Log-probs --------------------------------------------------------------------------------
def padded(rows, device, left=False):
    """N lists of ids, padded with 0 at the right or at the left. -> ids [N, T]; mask [N, T], True
    where an id stands. T is 1 at least."""
    longest = max(1, max(len(row) for row in rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = longest - len(row) if left else 0
        end = start + len(row)
        ids[i, start:end] = torch.tensor(row, dtype=torch.long)
        mask[i, start:end] = True
    return ids.to(device), mask.to(device)

def forward(model, ids, mask, cache):
    """Runs the columns of ids [N, S + T] that the cache, of S, does not hold yet; it gains their
    keys and values, with gradients if any. -> hidden states [N, T, H]."""
    start = cache.get_seq_length()
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [N, S + T]; padding takes up no position
    output = model.get_decoder()(
        input_ids=ids[:, start:], attention_mask=mask.long(), position_ids=positions[:, start:],
        use_cache=True, **{CACHE: cache})
    if cache.get_seq_length() == start:  # gradient checkpointing in train() mode drops it silently
        raise ValueError("the KV cache stayed empty")
    return output.last_hidden_state

def prefill(model, prompts):
    """Runs N prompts (lists of ids) but for their last tokens. Equal ones are run once, in training
    too, where the gradients of all rows that share them add up. -> ids [N, S] and their mask
    [N, S], padded at the left; a cache of all columns but the last."""
    index_of = {}  # each of the P different prompts -> its index
    for prompt in prompts:
        index_of.setdefault(tuple(prompt), len(index_of))
    ids, mask = padded(list(index_of), model.device, left=True)  # [P, S]
    if ids.shape[1] == 1:  # a column of padding, for FSDP wants every process to run the model here
        ids = torch.nn.functional.pad(ids, (1, 0))  # [P, 2]
        mask = torch.nn.functional.pad(mask, (1, 0))  # [P, 2]
    cache = DynamicCache(config=model.config)
    columns = max(1, PREFILL // len(index_of))
    end = 0
    while end < ids.shape[1] - 1:
        end = min(end + columns, ids.shape[1] - 1)
        forward(model, ids[:, :end], mask[:, :end], cache)
    sources = [index_of[tuple(prompt)] for prompt in prompts]  # [N]
    cache.batch_select_indices(sources)  # from P to N rows
    return ids[sources], mask[sources], cache

def response_logprobs(model, prompts, responses, temperature=1.0):
    """log pi(o_t | prompt, o_<t) of each response token, with gradients. prompts, responses: N
    lists of ids each. -> log-probs, nats, and their mask: [N, T] each, 0 where padded."""
    prompt_ids, prompt_mask, cache = prefill(model, prompts)  # [N, S]
    targets, mask = padded(responses, model.device)  # [N, T]
    ids = torch.cat([prompt_ids, targets], 1)  # [N, S + T]
    seen = torch.cat([prompt_mask, mask], 1)  # [N, S + T]
    # Each token is predicted from the one before it, so the last one need not be run.
    hidden = forward(model, ids[:, :-1], seen[:, :-1], cache)  # [N, T, H]
    head = model.get_output_embeddings()
    values = chunked_logprobs(head, hidden[mask], targets[mask], temperature)  # [sum of lengths]
    logprobs = values.new_zeros(mask.shape)  # [N, T]
    logprobs[mask] = values
    return logprobs, mask

def chunked_logprobs(head, hidden, targets, temperature=1.0, chunk=1024):
    """log softmax(head(hidden) / temperature)[target], nats, with gradients. hidden: [M, H];
    targets: [M]. -> [M], float32. The logits of a chunk, [chunk, V], are not kept: the backward
    pass computes them again."""
    logprobs = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk)):
        logprobs.append(checkpoint(target_logprobs, head, h, t, temperature, use_reentrant=False))
    return torch.cat(logprobs)  # [M]

def target_logprobs(head, hidden, targets, temperature):
    """log softmax(head(hidden) / temperature)[target], nats. [m, H], [m] -> [m], float32."""
    logits = head(hidden).float() / temperature  # [m, V]
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


# ---- 9. Rewards: is the last box right? ----------------------------------------------------------
# Skip to section 10 unless you care about grading. Two answers are equal if their normal forms are.
# The normal form is the value of an answer that can be computed, and otherwise its tidied text (if
# it is long, the text as it is). A model wrote these texts: they are read, and never run.

DIGITS = 150  # how many digits are computed
COMPARED = 110  # how many of them must agree
LARGEST = 1e50  # the bound of each result: 10^50 + 10^-50 has 101 digits, so that none is lost
LONGEST = 200  # characters in an answer that is computed
BRACKETS = 40  # brackets in it, which bounds how deep they are nested
CONSTANTS = {"pi": sympy.pi.evalf(DIGITS), "e": sympy.E.evalf(DIGITS)}

UNIT = (r"(?:\\?%|percent|[cmk]m|in|inch(?:es)?|ft|feet|mph|kg|degrees ?[CF]|(?:meter|mile|gram|"
        r"pound|liter|hour|minute|second|day|week|year|dollar|cent|degree|point|unit)s?)")
LABEL = r"(?:\\[a-z]+|[a-z]|[A-Z]{1,3})?(?:_\w+)? ?(?:\([a-zA-Z, ]+\))?[=∈]"
CALLED = r"[a-zA-Z]\d*(?:[_^](?:[^\W_]+|\{[^{}]*\}))* ?\("  # a letter, its scripts, and a bracket
GREEK = ("alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega|"
         "Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega")
NO_VALUE = r"\\\g<0>"  # puts a backslash before it, which `expression` then refuses

# Both tables are applied row by row, in their order: pattern, replacement, example or reason.
TIDY = [  # ways to write the same become one
    (r"\\\\\s*", ";", r"1 & 2 \\ 3 & 4 -> 1 & 2 ;3 & 4"),
    (r"\{[bp]matrix\}", "{matrix}", "{pmatrix} -> {matrix}"),
    (r"\\(?:emptyset|varnothing)(?![a-zA-Z])|\\\{\s*\\\}", "∅", r"\emptyset -> ∅"),
    (r"\\infty(?![a-zA-Z])|infinity", "∞", r"(-\infty, 3] -> (-∞, 3]"),
    (r"\\pi(?![a-zA-Z])|(?<![\\a-zA-Z])pi(?![a-zA-Z])", "π", r"2\pi -> 2π"),
    (r"\\(?:cdot|times)(?![a-zA-Z])|[×·]", "*", r"3 \times 4 -> 3 * 4"),
    (r"−", "-", "−5 (a minus sign) -> -5 (a hyphen)"),
    (r"\\pm(?![a-zA-Z])", "±", r"3 \pm 2 -> 3 ± 2"),
    (r"\\(?:leqslant|leq|le)(?![a-zA-Z])|<=", "≤", r"x \leq 5 -> x ≤ 5"),
    (r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|>=", "≥", r"x \geq 5 -> x ≥ 5"),
    (r"\\(?:neq|ne)(?![a-zA-Z])|!=", "≠", r"x \neq 5 -> x ≠ 5"),
    (r"\\in(?![a-zA-Z])", "∈", r"x \in [1, 2] -> x ∈ [1, 2]"),
    (r"\\[lc]?dots(?![a-zA-Z])|\.\.+", "…", r"1, 2, \dots -> 1, 2, …"),
    (r"(?<=\d)(?<!\b0)(?:\{,\}|,?\\[!,])\s*(?=\d{3}(?!\d))", "", r"12{,}345 -> 12345"),
    (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?|q?quad)(?![a-zA-Z])", " ", r"\left( -> ("),
    (r"\\[!,;:> ()]|~|\\?\$", " ", r"x\,y and \$5 -> x y and 5"),
    (r"\\(?:text\w*|math\w+|mbox|boldsymbol)\s*\{([^{}]*)\}", r" \1 ", r"5 \text{ cm} -> 5 cm"),
    (r",?\s*\b(?:and|or)\b", ",", "2 or 3 -> 2, 3"),
    (r"\\[cdt]frac", r"\\frac", r"\dfrac{1}{2} -> \frac{1}{2}"),
    (r"\\frac\s*(\w)", r"\\frac{\1}", r"\frac12 -> \frac{1}2"),
    (r"\\frac(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}", r"\frac{1}2 -> \frac{1}{2}"),
    (r"\\?sqrt|√", r"\\sqrt", r"√2 -> \sqrt2"),
    (r"\\sqrt(\[\w+\])?\s*(\w)", r"\\sqrt\1{\2}", r"\sqrt2 -> \sqrt{2}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", r"\sqrt(2) -> \sqrt{2}"),
    (r"_(?:(\w)|\{(\w+)\})", r"_\1\2 ", r"a_{1} -> a_1"),
    (r"\^\s*\{?\s*\\circ\s*\}?|°", " degrees ", r"30^\circ -> 30 degrees"),
    (r"((?:sin|cos|tan|cot|sec|csc).*)degrees", r"\1degrees here", r"\sin 30° keeps its unit"),
    (r"\s+", " ", "x   y -> x y"),
    (r"^ |[., ]+$", "", "5. -> 5"),
    (rf"(?<=[\d}})π]) ?(?:square |cubic )?{UNIT}(?: ?\^\{{?[23]\}}?)?(?= ?,|$)", "", "8 cm -> 8"),
    (r" ?([=∈≤≥≠]) ?", r"\1", "x = 5 -> x=5"),
    (r"^([^,]*)±([^,]*)$", r"\1+\2,\1-\2", "3±2 -> 3+2,3-2"),
]

PYTHON = [  # tidy LaTeX becomes a Python expression
    (r"(?<![\\a-zA-Z])(?:[a-zA-Z]{3,}|ln|lg|tg)", NO_VALUE, "arcsin x has no value"),
    # A letter before a bracket may be a function or a factor. It counts as a factor only if the
    # bracket holds a letter and a sum, as in x(x + 1).
    (rf"[fgFG](?:\^\{{?-1\}}?)?\(|{CALLED}(?![^()]*[\w}}] ?[-+])", NO_VALUE, "f(2x) has no value"),
    (rf"{CALLED}(?![^()]*[a-zA-Z])", NO_VALUE, "I(0) has no value"),
    (r"(?<![a-zA-Z])_", NO_VALUE, "1010_2 has no value"),
    (r"\d*\.\d*(?<=[\d.]{17})", NO_VALUE, "a float holds 15 digits, so longer ones have no value"),
    (r"(?<![\d.])00", NO_VALUE, "350,000 pages is not a list"),
    (r"(?<![\d.,])0(?=[1-9])", "", "05 -> 5"),
    (r"(?<![\w.}^/])(?<!\d )(\d+) ?(\\frac\{\d+\}\{\d+\}|(?<= )\d+/\d+)", r"(\1+\2)", "2 1/2"),
    (r"(?<![\\a-zA-Z_])([a-zA-Z])([a-zA-Z])(?![a-zA-Z])", r"\1 \2", "xy -> x y"),
    (r"π", " pi ", "π -> pi"),
    (r"∞", " infinity ", "∞ -> infinity"),
    (rf"\\({GREEK})(?![a-zA-Z])", r" greek_\1", r"\lambda -> greek_lambda"),
    (r"\\sqrt\[([^][]*)\]", r" root{\1}", r"\sqrt[3]{8} -> root{3}{8}"),
    (r"\\sqrt", " root{2}", r"\sqrt{5} -> root{2}{5}"),
    (r"\\frac", " frac", r"\frac{1}{2} -> frac{1}{2}"),
    (r"(?<=[)}]) ?(?=[a-zA-Z(])|(?<=\)) ?(?=\d)", "*", "(x + 1)(x + 2) -> (x + 1)*(x + 2)"),
    (r"(?<=\w) ?(?=\()|(?<=\w) +(?=[a-zA-Z])|(?<=\d)(?=[a-zA-Z])", "*", "2x(x+1) -> 2*x*(x+1)"),
    (r"\[", "(closed,", "[0, 1) -> (closed,0, 1)"),
    (r"\]", ",closed)", "(0, 1] -> (0, 1,closed)"),
    (r"(?<!\\)\{", "[", "frac{1}{2} -> frac[1}[2}"),
    (r"(?<!\\)\}", "]", "frac[1}[2} -> frac[1][2]"),
    (r"\\([{}])", r"\1", r"\{1, 2\} -> {1, 2}"),
    (r"\^", "**", "x^2 -> x**2"),
]

def math_reward(response, problem):
    """1.0 if the last box of the response (text) holds the answer of the Problem, else -1.0."""
    return 1.0 if is_correct(response, problem.answer) else -1.0

def extract_answer(text):
    r"""What the last \boxed{...} of the text holds; None if it is empty or was never closed."""
    boxes = re.split(r"\\boxed\s*\{", text)
    if len(boxes) == 1:
        return None
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", boxes[-1], re.DOTALL):  # \{ and \} are no braces
        if brace[0] == "{":
            depth += 1
        if brace[0] == "}":
            depth -= 1
        if depth == 0:
            return boxes[-1][:brace.start()].strip() or None
    return None

def is_correct(response, answer):
    """Whether the last box of the response (text) holds the answer (text, number). Never raises."""
    given = extract_answer(response)
    if given is None:
        return False
    return normal_form(given) == normal_form(str(answer))

@lru_cache(10**4)  # a reference is compared with every response to it
def normal_form(text):
    """What equal answers share: their values, or the tidy text without spaces. Hashable.

    Two expressions are equal if they have the same value at random points: each letter has a fixed
    random value, once positive and once negative, since x and sqrt(x^2) differ only for a negative
    x. That two different expressions agree at both points, to 110 digits, is as good as impossible.
    """
    if len(text) > LONGEST:
        return text
    tidy = tidied(text)
    if re.fullmatch("[a-zA-Z]{2,}", tidy):  # a word: as products, "no" and "on" would be equal
        return tidy.lower()
    try:
        items = ast.parse(expression(tidy) + ",", mode="eval").body.elts  # the comma: a tuple
        answer = items[0] if len(items) == 1 else ast.Set(items)  # a bare list has no order
        return form(answer, 1), form(answer, -1)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):  # no expression
        plain = re.sub(r"(?<!\d) | (?!\d)", "", tidy)  # 2 3 is not 23
        return plain or text

def tidied(text):
    """The text in the spelling that equal ones share, without its label (x =)."""
    for pattern, new, _ in TIDY:
        text = re.sub(pattern, new, text)
    label = re.match(LABEL, text)
    if label:
        values = re.sub(", ?" + re.escape(label[0]), ",", text[label.end():])  # x = 1, x = 2
        if not re.search("[=∈]", values):
            text = values
    if re.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+(?!\d)[^,]*", text):
        text = text.replace(",", "")  # 1,000
    return text

def expression(text):
    """The Python expression that tidy LaTeX stands for. ValueError if a part of it is unknown."""
    if len(re.findall(r"[(\[{]", text)) > BRACKETS:
        raise ValueError("too many brackets")
    for pattern, new, _ in PYTHON:
        text = re.sub(pattern, new, text)
    if not re.fullmatch(r"[\w\s+*/(){}\[\],.-]*", text, re.ASCII):
        raise ValueError("no expression")
    return text.strip()

def form(node, sign):
    """A tuple's items in their order, a set's items sorted, anything else's value as text."""
    match node:
        case ast.Tuple(items):
            return "tuple", *[form(item, sign) for item in items]
        case ast.List([item]):
            return form(item, sign)
        case ast.Set(items) | ast.List(items):  # {1, 2} without its backslashes is meant as a set
            return "set", *sorted([form(item, sign) for item in items], key=str)
    return str(sympy.Float(number(node, sign), COMPARED))

def number(node, sign):
    """The value of a node where all letters have this sign (1, -1). ValueError if it has none."""
    match node:
        case ast.Constant(int() | float() as value):
            result = sympy.Float(str(value), DIGITS)
        case ast.Name(name):
            result = letter(name, sign)
        case ast.List([term]) | ast.UnaryOp(ast.UAdd(), term):
            result = number(term, sign)
        case ast.UnaryOp(ast.USub(), term):
            result = -number(term, sign)
        case ast.BinOp(left, ast.Add(), right):
            result = number(left, sign) + number(right, sign)
        case ast.BinOp(left, ast.Sub(), right):
            result = number(left, sign) - number(right, sign)
        case ast.BinOp(left, ast.Mult(), right):
            result = number(left, sign) * number(right, sign)
        case ast.BinOp(left, ast.Div(), right):
            result = number(left, sign) * power(number(right, sign), -1)
        case ast.BinOp(base, ast.Pow(), exponent):
            result = power(number(base, sign), number(exponent, sign))
        case ast.Subscript(ast.Subscript(ast.Name("frac"), above), below):  # frac[1][2]
            result = number(above, sign) * power(number(below, sign), -1)
        case ast.Subscript(ast.Subscript(ast.Name("root"), degree), base):  # root[3][8]
            result = power(number(base, sign), power(number(degree, sign), -1))
        case _:
            raise ValueError("no number")
    if result and not 1 / LARGEST < abs(float(result)) < LARGEST:
        raise ValueError("out of range")
    return result

@lru_cache(1000)
def letter(name, sign):
    """The value of a name: that of a constant, else a fixed random one of this sign."""
    if name in CONSTANTS:
        return CONSTANTS[name]
    value = random.Random(name).uniform(1, 2)
    return sympy.Float(sign * value, DIGITS)

def power(base, exponent):
    """base ^ exponent, both real. ValueError if it is out of range, as 0 ^ -1 is.

    An odd root of a negative number is negative: (-8)^(1/3) is -2. An even one is not real: there
    (-1)^exponent is treated like a letter's power, so that (-4)^(1/2) equals itself and no number.
    """
    if not base and float(exponent) > 0:
        return base
    if abs(float(exponent) * math.log(abs(base))) > math.log(LARGEST):  # before it is computed
        raise ValueError("out of range")
    size = sympy.Float(abs(base) ** exponent, DIGITS)
    if float(base) > 0:
        return size
    # Is the exponent whole, or a fraction over 3, 5 or 7? Then its numerator, even or odd, gives
    # the sign.
    times = abs(exponent) * 3 * 5 * 7
    nearest = int(times + sympy.Rational(1, 2))
    if abs(float(times - nearest)) < 1 / LARGEST:
        return size if nearest % 2 == 0 else -size
    return size * letter("minus one", 1) ** exponent


# ---- 10. Grading and evaluation ------------------------------------------------------------------
def grade(tokenizer, problems, responses, reward):
    """The reward of each response. problems: P Problems; responses: [P][n] lists of ids; reward:
    reward(response, problem) -> float. -> texts [P][n]; rewards [P, n] in [-1, 1], float64.

    Each response is graded once, by one process that tells the others: two calls of a random,
    timed or judged reward may differ, and then so would the rows of the processes."""
    graded = []
    for problem, group in zip(my_share(problems), my_share(responses)):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in group]
        rewards = [checked_reward(reward, text, problem) for text in texts]
        graded.append((texts, rewards))
    graded = gather_shares(graded)
    texts = [group_texts for group_texts, _ in graded]
    rewards = [group_rewards for _, group_rewards in graded]
    return texts, torch.tensor(rewards, dtype=torch.float64)

def checked_reward(reward, response, problem):
    """reward(response, problem), which is refused unless it is a number in [-1, 1]."""
    R = reward(response, problem)
    if not isinstance(R, numbers.Real) or not -1 <= R <= 1:  # fails for NaN, too
        raise UserError(f"the reward returned {R!r}: it must be a number from -1 to 1")
    return float(R)

def evaluate(model, tokenizer, problems, config, reward=math_reward):
    """Samples of each of P problems, from q alone, for use from other code. -> metrics, a dict
    (`evaluation_metrics`)."""
    rollouts = answer_problems(model, tokenizer, problems, config, reward)
    return evaluation_metrics(rollouts)

def answer_problems(model, tokenizer, problems, config, reward):
    """k samples of each of P problems, from q alone, the same draws at every evaluation.
    -> [P] rollout records, without a segment."""
    c = config
    seed_generators(c.seed, 10**9)  # a step that no run reaches
    k = c.eval_samples if c.temperature else 1  # greedy samples are all alike
    prompts = [problem.ids for problem in problems]
    groups = distributed_generate(model, tokenizer, prompts, k, c.max_new_tokens, c)  # [P][k]
    responses = [token_lists(group) for group in groups]  # [P][k] lists of ids
    texts, R = grade(tokenizer, problems, responses, reward)  # [P][k], [P, k]
    A = group_advantages(R)  # [P, k], as training would see them
    return rollout_records(tokenizer, range(len(problems)), problems, groups, texts, R, A)

def evaluation_metrics(rollouts):
    """A response is right if its reward is above 0. accuracy: avg@k, the share of right responses;
    pass_at_k: of problems with a right one; truncated: of responses cut at the limit."""
    right = []
    truncated = []
    for rollout in rollouts:
        responses = rollout["responses"]
        right.append([response["reward"] > 0 for response in responses])
        truncated.append([response["truncated"] for response in responses])
    right = np.array(right)  # [P, k]
    return dict(
        accuracy=right.mean(),
        pass_at_k=right.any(1).mean(),
        truncated=np.mean(truncated),
        problems=right.shape[0],
        samples=right.shape[1],
    )


# ---- 11. Problems and the model ------------------------------------------------------------------
def sum_problems():
    """2048 built-in Problems: six digits, and the last digit of their sum."""
    rng = np.random.default_rng(20260409)
    problems = []
    for number in rng.permutation(10**6)[:2048]:
        question = f"{number:06d}"
        total = sum(int(digit) for digit in question)
        problems.append(Problem(question, str(total % 10)))
    return problems

def arithmetic_problems():
    """About 2048 built-in Problems, all different: a + b * c."""
    rng = np.random.default_rng(20260409)
    triples = rng.integers(2, 100, (2048, 3))
    problems = []
    for a, b, c in np.unique(triples, axis=0):
        problems.append(Problem(f"What is {a} + {b} * {c}?", str(a + b * c)))
    return problems

def parse_problem(line, needs_answer):
    """The Problem that one line of a data file (bytes) holds. Any exception means that it holds
    none."""
    row = json.loads(line.decode("utf-8-sig"))  # json.loads would guess other encodings
    key = "problem" if row.get("question") is None else "question"
    question = row.pop(key)
    question = question.encode(errors="replace").decode()  # no lone surrogates
    if not question.strip():
        raise ValueError("an empty question")
    answer = row.pop("answer", None)
    if answer is None and not needs_answer:
        return Problem(question, "", row=row)
    if type(answer) not in (str, int, float):  # True is an int by isinstance
        raise ValueError("no answer")
    if isinstance(answer, float):
        if not math.isfinite(answer):
            raise ValueError("no number")
        answer = format(Decimal(repr(answer)), "f")  # 0.00001, and not 1e-05
    answer = str(answer).rsplit("####", 1)[-1].strip()  # GSM8K ends in "#### 18"
    answer = extract_answer(answer) or answer
    if not answer:
        raise ValueError("an empty answer")
    return Problem(question, answer, row=row)

def load_problems(source, needs_answer=True):
    """The Problems of a JSON Lines file, or the built-in "sums" or "arithmetic". A line has a
    "question" or "problem", and an "answer": text, a number, or GSM8K's "... #### 18". Its other
    fields go into Problem.row. A reward of your own may do without the answer."""
    if source == "sums":
        return sum_problems()
    if source == "arithmetic":
        return arithmetic_problems()
    wanted = 'JSON Lines, each line an object with a "question" or "problem" (text)'
    if needs_answer:
        wanted += ' and an "answer" (text or number)'
    problems = []
    lines = Path(source).read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem = parse_problem(line, needs_answer)
        except Exception:  # a line may hold anything
            found = repr(line[:40])  # bytes: whatever is not ASCII is shown as an escape
            raise UserError(
                f"{source}, line {number}: it must be {wanted}, but begins with {found}"
            ) from None
        problems.append(problem)
    if not problems:
        raise UserError(f"{source} is empty: it must be {wanted}")
    return problems

def prompt_ids(tokenizer, question, template="auto"):
    """The ids of a prompt. template: "auto" adds a request for a box, and the chat template if
    there is one; "none" takes the question as it is."""
    if template == "auto":
        question += "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": question.strip()}]
            return tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                return_dict=False,
                date_string="1 Jan 2026",  # some templates write today's date
            )
    ids = tokenizer(question)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers append it to every text
        return ids[:-1]
    return ids

def end_of_turn(tokenizer):
    """The id of the token that the chat template writes after an assistant's message, or None. A
    Qwen2.5 base model has EOS <|endoftext|>, but a template that writes <|im_end|>. It counts only
    if it was added to the vocabulary: plain templates go on with a newline there, at which every
    response would stop. paper silent."""
    marker = "THE ANSWER"
    messages = [
        {"role": "user", "content": "THE QUESTION"},
        {"role": "assistant", "content": marker},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        _, found, rest = text.rpartition(marker)
        ids = tokenizer(rest.strip(), add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
    except Exception:  # no template, or one that knows no assistant
        return None
    if found and ids and ids[0] in added:
        return ids[0]
    return None

def load_model(config):
    """The model of --model in float32, on a GPU if there is one, and its tokenizer. No remote code
    and no pickle is run, and a model whose log-probs would be wrong is refused. Its
    generation_config keeps nothing but the ids that end a response, the end of a turn among them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.model == "embedded":
        torch.set_num_threads(1)  # in so small a model threads only wait for one another
        steps = 0 if config.resume else 400  # a resumed run has its weights in the checkpoint
        model, tokenizer = embedded_model(config.seed, steps)
        return model.to(device), tokenizer
    source = config.model
    if re.fullmatch("(?i)qwen[^/]*", source) and not Path(source).exists():
        source = f"Qwen/{source}"  # Qwen2.5-0.5B is short for Qwen/Qwen2.5-0.5B
    try:
        if find_adapter_config_file(source):
            raise ValueError("it is a LoRA adapter: merge it into its base model first")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_weights refuses them, in words
        )
        model.eval().to(device)  # no dropout: pi at the update is the pi that sampled
        check_weights(report)
        check_architecture(model)
        check_tokenizer(model, tokenizer, config.template)
        probe_logprobs(model)
    except Exception as error:  # folders, hubs and architectures have many ways to be wrong
        cause = str(error) or repr(error)
        raise UserError(f"cannot use --model {source}: {cause}") from None
    ends = (eos_ids(model, tokenizer) | {end_of_turn(tokenizer)}) - {None}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None)
    return model, tokenizer

def check_weights(report):
    """Raises ValueError if not every weight came from the files: transformers makes up the others
    at random. report: its loading info, in which a head tied to the embedding is not missing."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"its files lack {len(missing)} of its weights, the first is {missing[0]} (a reward "
            "model, or an incomplete copy?)"
        )
    misshapen = sorted(report["mismatched_keys"])
    if misshapen:
        name, found, wanted = misshapen[0]
        raise ValueError(
            f"{name} has the shape {list(found)} in its files, but {list(wanted)} by its "
            "config.json"
        )

def check_architecture(model):
    """Raises ValueError for what sampling and log-probs cannot do: they share and select the keys
    and values of attention, and take the logits as they come from the head."""
    cache = DynamicCache(config=model.config)
    recurrent = any(hasattr(layer, "recurrent_states") for layer in cache.layers)
    if recurrent or getattr(model, "_is_stateful", False):
        raise ValueError(
            "it has recurrent states (as Mamba or linear attention have), which cannot be shared "
            "as the keys and values of attention are"
        )
    settings = model.config.get_text_config(decoder=True)
    neutral = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1}
    for name, harmless in neutral.items():
        value = getattr(settings, name, None)
        if value is not None and value != harmless:
            raise ValueError(
                f"its logits are scaled or capped after the head ({name} is {value} in its "
                "config.json), and the log-probs here would be those without that"
            )

def check_tokenizer(model, tokenizer, template):
    """Raises ValueError if it makes no prompts: a chat template may refuse, and some tokenizers
    load as empty, silently, where their files are missing."""
    ids = prompt_ids(tokenizer, "1 + 1", template)
    if not ids:
        raise ValueError("its tokenizer makes no tokens of a text: its files are missing")
    if ids == prompt_ids(tokenizer, "2 + 3", template):
        raise ValueError("its chat template drops the question")
    check_ids(model, ids)

def check_ids(model, ids):
    """Raises ValueError if an id is beyond the embedding, which would crash a GPU."""
    known = len(model.get_input_embeddings().weight)
    largest = max(ids, default=0)
    if largest >= known:
        raise ValueError(
            f"its tokenizer or chat template gives the id {largest}, but its embedding ends at "
            f"{known - 1}: they do not belong together"
        )

@torch.no_grad()
def probe_logprobs(model):
    """Raises ValueError if log-probs through a shared and padded cache are not those of a plain
    forward pass. What nobody thought of in an architecture shows here."""
    prompts = [[1, 2, 3], [3, 1], [3, 1]]  # the last is padded, and shares its cache
    responses = [[4], [5, 4], [5, 4]]
    try:
        shared, _ = response_logprobs(model, prompts, responses)  # [3, 2]
    except Exception as error:
        raise ValueError(
            f"it does not run on a shared cache of keys and values (recurrent states?): {error}"
        ) from None
    ids = torch.tensor([[3, 1, 5, 4]], device=model.device)
    logits = model(ids).logits[0].float()  # [4, V]
    table = logits.log_softmax(-1)
    plain = table[[1, 2], [5, 4]]  # [2], of 5 after 3 1, of 4 after 3 1 5
    if not plain.isfinite().all():
        raise ValueError("its log-probs are not finite: the weights are broken")
    if not torch.allclose(shared[2], plain, atol=1e-3):
        gap = (shared[2] - plain).abs().max()
        raise ValueError(
            f"log-probs through a shared KV cache are {gap:.3g} nats off a plain pass: it is not "
            "causal, or changes its logits after the head"
        )

def context_length(model):
    """The longest sequence, in tokens, in which each position is computed the same way. longrope
    (Phi-3.5, Phi-4-mini) changes the frequencies of ALL positions when the longest row of a batch
    passes its original length: sampling and update, batched differently, would disagree."""
    settings = model.config.get_text_config(decoder=True)
    context = getattr(settings, "max_position_embeddings", None) or math.inf
    rope = getattr(settings, "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, dict)]
    for part in [rope, *by_layer_type]:
        if part.get("rope_type") == "longrope":
            context = min(context, part["original_max_position_embeddings"])
    return context

def room_for_prompts(model, config):
    """How many tokens a prompt may have, so that [s, q] and a response fit into the context. GRPO
    and evaluations leave room for s, too, so that all runs see the same problems."""
    longest = max(config.init_length, config.max_new_tokens)  # L_q never exceeds the larger one
    segment = min(config.max_new_tokens, math.ceil(config.split_high * longest))
    context = context_length(model)
    room = context - segment - config.max_new_tokens
    if room < 1:
        raise UserError(
            f"the model's context of {context} tokens is too short for a segment of {segment}, a "
            f"prompt and a response of {config.max_new_tokens} tokens: lower --max_new_tokens"
        )
    return min(room, config.max_prompt_tokens)

def training_source(config):
    """The file of --data, or the name of the built-in problems that stand in for it."""
    built_in = "sums" if config.model == "embedded" else "arithmetic"
    return config.data or built_in

def evaluation_sources(config):
    """The files of --eval_data, a list of names; commas may have spaces around them."""
    names = [name.strip() for name in config.eval_data.split(",")]
    return [name for name in names if name]

def fitting_problems(name, problems, needed, model, tokenizer, config):
    """Gives Problems the ids of their prompts. -> those whose prompts fit; raises UserError if they
    are fewer than `needed`. The screen says how many are dropped."""
    room = room_for_prompts(model, config)
    for problem in problems:
        try:
            problem.ids = prompt_ids(tokenizer, problem.question, config.template)
            check_ids(model, problem.ids)
        except Exception as error:  # a chat template may raise anything
            raise UserError(f"cannot use --model {config.model}: {error}") from None
    fitting = [problem for problem in problems if 0 < len(problem.ids) <= room]
    say(f"{name}: {len(fitting)} of {len(problems)} problems have prompts of 1 to {room} tokens")
    if len(fitting) >= needed:
        return fitting
    if len(problems) < needed:
        advice = "lower --prompts_per_step"
    elif room == config.max_prompt_tokens:
        advice = "raise --max_prompt_tokens"
    else:
        advice = "lower --max_new_tokens, which leaves more of the context to prompts"
    raise UserError(f"{name}: {len(fitting)} problems are too few, {needed} are needed: {advice}")

def load_data(config, model, tokenizer, needs_answer=True):
    """The Problems to train on, and {name: Problems} to evaluate on, with the ids of their prompts.
    Without --eval_data an eighth of --data is held out, at most 256, the same whatever the seed."""
    eval_sets = {}
    for source in evaluation_sources(config):
        eval_sets[source] = load_problems(source, needs_answer)
    train = []
    if config.steps or not eval_sets:
        train = load_problems(training_source(config), needs_answer)
    if not eval_sets:
        np.random.default_rng(0).shuffle(train)
        count = min(256, max(1, len(train) // 8))
        eval_sets["held-out"] = train[:count]
        train = train[count:]
    if config.steps:
        needed = config.prompts_per_step
        train = fitting_problems("--data", train, needed, model, tokenizer, config)
    for name, problems in eval_sets.items():
        first = problems[:config.eval_problems or None]  # 0: all
        label = name
        if len(first) < len(problems):
            label = f"{name}, the first {len(first)} of {len(problems)}"
        eval_sets[name] = fitting_problems(label, first, 1, model, tokenizer, config)
    return train, eval_sets

def character_model(alphabet, seed):
    """A random Qwen2 of 75k parameters and its tokenizer, for experiments that take seconds.
    alphabet: V - 2 tokens, mostly characters; their ids are their places in it, and <eos> and <unk>
    follow. The chat template writes a question's first line and "=", which must be in it."""
    words = [*alphabet, "<eos>", "<unk>"]
    eos = words.index("<eos>")
    pieces = [(word, -1.0) for word in words]
    unigram = tokenizers.models.Unigram(pieces, unk_id=words.index("<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(unigram), eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Fuse()  # no spaces between tokens
    tokenizer.chat_template = "{{ messages[0]['content'].split('\\n')[0] }}="
    settings = transformers.Qwen2Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=eos,
        pad_token_id=eos,
        initializer_range=0.1,  # with 0.02 it starts to learn ten times later
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(settings)
    return model.eval(), tokenizer

def pretrain(model, documents, start, steps):
    """Supervised training, in place. documents: an iterator of batches of ids [N, T], -1 where
    there is no token. The model learns what stands from column `start` on, where -1 may come only
    at the end."""
    optimizer = torch.optim.AdamW(model.parameters())
    for step in tqdm(range(steps), "supervised training of the embedded model", **BAR):
        ids = torch.tensor(next(documents))  # [N, T]
        targets = ids[:, start:]  # [N, T - start]
        cache = DynamicCache(config=model.config)
        seen = ids >= 0
        hidden = forward(model, ids.clamp(min=0), seen, cache)  # [N, T, H]
        logits = model.lm_head(hidden[:, start - 1:-1])  # [N, T - start, V]
        loss = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=-1)
        loss.backward()
        rise = (step + 1) / 20
        fall = 2 * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, rise, fall)
        optimizer.step()
        optimizer.zero_grad()

SUM_ALPHABET = [*"0123456789=", "\\boxed{", "}"]  # a digit is its own id

def worked_sums(seed, batch, slips):
    """Endless batches of documents, ids [batch, 23]: six digits, "=", their running sums modulo 10,
    the last sum boxed, <eos>. A step slips with probability `slips`, and later sums carry the slip
    on. In half of the documents a piece of another attempt stands ahead, as s does in [s, q]."""
    rng = np.random.default_rng([seed, 0])
    column = np.ones((batch, 1), int)
    equals = SUM_ALPHABET.index("=") * column
    box = SUM_ALPHABET.index("\\boxed{") * column
    close = SUM_ALPHABET.index("}") * column
    eos = len(SUM_ALPHABET) * column
    while True:
        digits = rng.integers(10, size=(batch, 6))
        error = rng.integers(1, 10, (batch, 6))
        slips_now = rng.random((batch, 6)) < slips
        slip = error * slips_now
        work = (digits + slip).cumsum(1) % 10  # [batch, 6]
        attempt = (work + slip[::-1]) % 10  # [batch, 6]: the sums, with another document's slips
        length = rng.integers(1, 7, (batch, 1))
        ahead = rng.random((batch, 1)) < 0.5
        attempt[np.arange(6) >= length * ahead] = -1
        yield np.hstack([attempt, digits, equals, work, box, work[:, -1:], close, eos])

def embedded_model(seed, steps=400, batch=64, slips=0.2):
    """A character-level Qwen2 that stands in for a pretrained model: it was shown worked digit sums
    in which one step in five slips, so that it knows how, yet is often wrong. -> model, tokenizer.
    """
    model, tokenizer = character_model(SUM_ALPHABET, seed)
    documents = worked_sums(seed, batch, slips)
    pretrain(model, documents, start=13, steps=steps)  # what follows "="
    return model, tokenizer


# ---- 12. Several processes (torchrun); one process is a group of one -----------------------------
def join_processes():
    """Joins the processes of torchrun, one per GPU, or several on the CPU. Without torchrun this
    one is a group by itself, so that nothing else needs to ask how many there are."""
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group()  # gloo for the CPU, nccl for GPUs
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)

def rank_and_world():
    """Which process this is, and how many there are; joins them if need be."""
    join_processes()
    return dist.get_rank(), dist.get_world_size()

def is_first_process():
    """Whether this one prints and writes files."""
    rank, _ = rank_and_world()
    return rank == 0

def my_share(items):
    """This process's share of a list."""
    rank, world = rank_and_world()
    return items[rank::world]

def gather_shares(mine):
    """The inverse of `my_share`: the items of all processes, in the order they had."""
    _, world = rank_and_world()
    shares = [None] * world
    dist.all_gather_object(shares, mine)
    total = sum(len(share) for share in shares)
    return [shares[i % world][i // world] for i in range(total)]

def wait_for_all():
    """Returns when every process has come here."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    dist.barrier(device_ids=devices)  # NCCL guesses one otherwise

def seed_generators(seed, step):
    """Seeds torch, differently in each process. Everything follows from seed and step, so that a
    checkpoint needs to hold no generator. -> a NumPy generator, the same in all processes."""
    rank, _ = rank_and_world()
    rng = np.random.default_rng([seed, step])
    torch.manual_seed(int(rng.integers(2**62)) + rank)
    return rng

def distributed_generate(model, tokenizer, prompts, n, limits, config):
    """`generate`, the prompts dealt out to the processes. prompts: P lists of ids; limits: tokens,
    an int or one per prompt. -> [P][n] Samples, in every process."""
    unshard(model)
    limits = np.broadcast_to(limits, len(prompts))
    samples = generate(
        model, tokenizer, my_share(prompts), n, my_share(limits).tolist(), config.temperature)
    return gather_shares(samples)

def shard(model, config):
    """FSDP2: float32 master weights, gradients and moments, of which each process holds its part;
    compute and KV cache in --dtype. One process on a CPU in float32 runs without FSDP.

    FSDP gathers the compute copies of the weights before a module's forward pass and frees them
    after it. Here they stay between two steps of the optimiser, so that no process waits for
    another while it samples: `unshard` makes them, and `reshard` frees them once the masters have
    moved. Both are called by hand because FSDP's own hooks know only the whole model's forward
    pass, while this file calls its decoder and its head. (The hooks run all the same, 2 to 3 ms per
    decoder call while sampling; there is no public switch.) Make the optimiser after this, before
    the first `unshard`: it must hold the masters. Sample by `distributed_generate`, which unshards.
    """
    cuda = model.device.type == "cuda"
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and cuda)
    if not cuda and not bf16 and dist.get_world_size() == 1:
        return
    # On H100 and H200 cuDNN's attention gives NaN gradients for masks of some lengths (64 modulo
    # 128; pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    compute = torch.bfloat16 if bf16 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    block_names = model._no_split_modules or []
    blocks = [module for module in model.modules() if type(module).__name__ in block_names]
    for module in [*blocks, model]:
        fully_shard(module, mp_policy=policy, reshard_after_forward=False)
        module.set_reshard_after_backward(False)
        module.set_gradient_divide_factor(1)  # a sum: Row.weight has divided already
        module.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():
        model(torch.tensor([[0]], device=model.device))  # makes model the root
    reshard(model)  # an optimiser wants the masters

def unshard(model):
    """Makes the compute copies of the weights from the masters, where they are not there yet."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()

def reshard(model):
    """Frees the compute copies of the weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- 13. The run: loop, screen, files, checkpoints, command line ---------------------------------
def train(config, reward=math_reward):
    """Evaluates, trains config.steps steps, evaluates again. reward: as in `collect`; with one of
    your own a problem needs no answer. -> the run's folder, a Path."""
    c = config
    check_config(c)
    check_run_folder(c, reward)
    join_processes()
    model, tokenizer = load_model(c)
    problems, eval_sets = load_data(c, model, tokenizer, needs_answer=reward is math_reward)
    shard(model, c)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), fused=True)
    start_moments(optimizer)
    state = initial_state(len(problems), c)
    if c.resume:
        load_checkpoint(Path(c.out), model, optimizer, state, problems)
    out = open_run_folder(c, reward)
    introduce(out, model, state, c)

    first_accuracy = {}  # of each evaluation set, when this process evaluated it first
    first_step = state.step + 1 if c.resume else 0  # step 0 only evaluates
    for step in range(first_step, c.steps + 1):
        state.step = step
        last = step == c.steps
        evaluating = not c.steps or (c.eval_every and (last or step % c.eval_every == 0))
        if step > 0:
            start = time.perf_counter()
            collect_rows = collect_grpo if c.algo == "grpo" else collect
            rows, rollouts, metrics = collect_rows(model, tokenizer, problems, state, c, reward)
            collected = time.perf_counter()
            metrics["lr"] = set_learning_rate(optimizer, step, c)
            metrics |= learn(model, optimizer, rows, c)
            learned = time.perf_counter()
            metrics["rollout_seconds"] = collected - start
            metrics["update_seconds"] = learned - collected
            metrics["seconds"] = learned - start
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9  # of the run
            rollout = mixed_rollout(rollouts)
            log_step(out, step, metrics, rollout, c)
            if step == 1 or evaluating:
                show_rollout(rollout, c)
        if evaluating:
            for name, eval_set in eval_sets.items():
                answered = answer_problems(model, tokenizer, eval_set, c, reward)
                log_evaluation(out, step, name, answered, first_accuracy, c)
                if step == 0:
                    show_rollout(mixed_rollout(answered), c)
        if step > 0 and (last or (c.save_every and step % c.save_every == 0)):
            save_checkpoint(out, model, tokenizer, optimizer, state)
    conclude(out, c)
    return out

def start_moments(optimizer):
    """AdamW makes a weight's moments at its first gradient, which may come late or never. A
    checkpoint saved before would make them by a step of its own, so they are made here."""
    for weight in optimizer.param_groups[0]["params"]:
        optimizer.state[weight] = dict(
            step=torch.zeros((), device=weight.device),
            exp_avg=torch.zeros_like(weight),
            exp_avg_sq=torch.zeros_like(weight),
        )

def set_learning_rate(optimizer, step, config):
    """Linear warm-up, then constant (Appendix C); and the weight decay, since a resumed run may
    change both. paper silent: the warm-up counts training steps. -> the learning rate."""
    lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = config.weight_decay
    return lr

def log_step(out, step, metrics, rollout, config):
    """A training step's line in metrics.jsonl, in rollouts.jsonl and on the screen."""
    append_line(out / "metrics.jsonl", dict(step=step, **metrics))
    append_line(out / "rollouts.jsonl", dict(step=step, **rollout))
    names = ["reward", "truncated", "response_tokens", "zero_advantage", "seconds"]
    seconds = metrics["seconds"] * (config.steps - step)
    left = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    say(f"step {step:4d}  {screen_figures(metrics, names)}  {left} to go")
    warn_of_truncation(metrics, config)

def log_evaluation(out, step, name, rollouts, first_accuracy, config):
    """An evaluation's line in metrics.jsonl and on the screen. first_accuracy: {name: accuracy},
    filled in at the first evaluation of each set."""
    metrics = evaluation_metrics(rollouts)
    append_line(out / "metrics.jsonl", dict(step=step, data=name, **metrics))
    figures = screen_figures(metrics, ["accuracy", "pass_at_k", "truncated"])
    size = f"{metrics['problems']} problems x {metrics['samples']}"
    say(f"step {step:4d}  {figures}  on {name} ({size})")
    warn_of_truncation(metrics, config)
    first = first_accuracy.setdefault(name, metrics["accuracy"])
    if metrics["accuracy"] < first:
        upstream = config.algo == "skpo" and config.w_up
        advice = "--w_up 0.1 or 0, or a lower --lr" if upstream else "a lower --lr"
        say(f"           lower than at first: try {advice}")

def append_line(path, record):
    """Adds a record to a JSON-lines file; the first process does."""
    if is_first_process():
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

# -- the screen
def say(text):
    """Prints a line; the first process does. What the terminal's encoding lacks is escaped."""
    if is_first_process():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))

def screen_figures(metrics, names):
    """Some of the metrics for the screen, as in "reward -0.438  truncated 0.000"."""
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in names)

def warn_of_truncation(metrics, config):
    """Says what to do where hardly any response comes to its end."""
    if metrics["truncated"] >= 0.9:
        say(f"           {metrics['truncated']:.0%} of the responses were cut at --max_new_tokens "
            f"{config.max_new_tokens}, mostly before an answer: raise it")

def mixed_rollout(rollouts):
    """The first rollout with right and wrong responses, else the first."""
    for rollout in rollouts:
        rewards = [response["reward"] for response in rollout["responses"]]
        if min(rewards) <= 0 < max(rewards):
            return rollout
    return rollouts[0]

def show_rollout(rollout, config):
    """Prints what the model read and wrote: [s, q] with the segment marked, then the first right
    and the first wrong response. Before any step, and with GRPO, there is no segment."""
    prompt = f"prompt {printable(rollout['prompt'])}"
    if rollout["segment"] is not None:
        text = printable(rollout["segment"])
        figures = f"(R_I {rollout['value']:+.2f}, A {rollout['advantage']:+.2f})"
        segment = paint(f"segment {text} {figures}", "cyan")
        if config.ablation == "no_skip":
            prompt = f"{prompt} | {segment}"
        else:
            prompt = f"{segment} | {prompt}"
    say(f"           {prompt}")
    right = [response for response in rollout["responses"] if response["reward"] > 0]
    wrong = [response for response in rollout["responses"] if response["reward"] <= 0]
    for response in right[:1] + wrong[:1]:
        text = paint(printable(response["text"]), "green" if response["reward"] > 0 else "red")
        end = ", cut at --max_new_tokens" if response["truncated"] else ""
        say(f"           -> {text} reward {response['reward']:+g} (A {response['advantage']:+.2f})"
            f"{end}")

def printable(text, most=300):
    """A model's text in quotes, for a terminal: one line, the middle left out of a long one."""
    if len(text) > most:
        text = text[:most // 2] + " ... " + text[-most // 2:]
    return f"'{escaped(text)}'"

def escaped(text):
    """The text with its control characters, which could move the cursor or worse, as escapes."""
    shown = ""
    for character in text:
        if character.isprintable():
            shown += character
        else:
            shown += character.encode("unicode_escape").decode()
    return shown

def paint(text, color):
    """The text in a colour, on a terminal."""
    codes = dict(cyan=36, green=32, red=31)
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        text = f"\x1b[{codes[color]}m{text}\x1b[0m"
    return text

def introduce(out, model, state, config):
    """The lines on the screen before the run."""
    c = config
    parameters = model.num_parameters() / 1e6
    say(f"{c.model}: {parameters:.2f}M parameters, {dist.get_world_size()} x {model.device}")
    if not c.steps:
        say(f"{out}: evaluation alone")
    elif state.step >= c.steps:
        say(f"{out}: all of its {c.steps} steps are done; a higher --steps goes on")
    else:
        method = c.algo if c.ablation == "none" else f"{c.algo}, ablation {c.ablation}"
        say(f"{out}: {method}, steps {state.step + 1} to {c.steps}, each of {c.prompts_per_step} "
            f"prompts x {c.group_size} responses of up to {c.max_new_tokens} tokens")

def conclude(out, config):
    """The last lines on the screen: where everything is, and what to type next."""
    if not config.steps:
        say(f"the figures are in {out / 'metrics.jsonl'}")
        return
    if config.eval_data:
        data = f'--eval_data "{config.eval_data}"'
    else:  # what was held out of --data
        data = f"--data {training_source(config)}"
    names = ["template", "max_new_tokens", "temperature", "eval_samples", "eval_problems"]
    same = " ".join(f"--{name} {getattr(config, name)}" for name in names)
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    command = f"{python} {sys.argv[0]}"
    say(f"the model is in {out / 'model'}, beside it are metrics.jsonl and rollouts.jsonl")
    say(f"to evaluate it:    {command} --steps 0 --model {out / 'model'} {data} {same}")
    say(f"to go on with it:  {command} --resume --out {out} --steps {2 * config.steps}")

# -- the run's folder, checkpoints
def check_run_folder(config, reward):
    """Raises UserError if --out cannot be used, before minutes go by for the model.

    A run that was stopped before its first checkpoint may be started again in its folder."""
    if not config.out:
        return
    out = Path(config.out)
    parent = out
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out}: cannot write to {parent}")
    saved = read_run_config(out)
    has_checkpoint = (out / "checkpoint.pt").is_file()
    if config.resume:
        if saved is None or not has_checkpoint:
            raise UserError(f"--resume: there is no checkpoint in {out}; without --resume the run "
                            "starts again")
        if saved["reward"] != reward_name(reward):
            raise UserError(f"--resume: this run's reward is {saved['reward']}, not "
                            f"{reward_name(reward)}")
        return
    names = {path.name for path in out.glob("*")}
    expected = {"config.json", "metrics.jsonl", "rollouts.jsonl", "model"}
    expected |= {"config.tmp", "checkpoint.tmp"}
    unfinished = saved is not None and not has_checkpoint and names <= expected
    if unfinished and not saved["steps"]:
        unfinished = False  # it is an evaluation, whose figures would be lost
    if names - {"config.tmp"} and not unfinished:
        raise UserError(f"--out {out} is not empty: go on with the run in it (--resume), or choose "
                        "another folder")

def read_run_config(out):
    """What the config.json of a run's folder holds, a dict; None if it is not one of ours."""
    try:
        saved = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if isinstance(saved, dict) and {"algo", "ablation", "reward"} <= saved.keys():
        return saved
    return None

def open_run_folder(config, reward):
    """Makes the run's folder and its config.json, which takes its name by a rename. -> Path, the
    same in all processes."""
    names = [config.out]
    if is_first_process():
        if not config.out:
            now = time.strftime("%Y%m%d-%H%M%S")
            names = [new_folder(f"runs/{now}-{config.algo}-{config.seed}")]
        out = Path(names[0])
        out.mkdir(parents=True, exist_ok=True)
        saved = dict(vars(config), reward=reward_name(reward))
        (out / "config.tmp").write_text(json.dumps(saved, indent=1))
        os.replace(out / "config.tmp", out / "config.json")
        if not config.resume:  # of a run that was stopped before its first checkpoint
            (out / "metrics.jsonl").write_text("")
            (out / "rollouts.jsonl").write_text("")
    dist.broadcast_object_list(names)
    return Path(names[0])

def new_folder(name):
    """Makes a folder, with another name if there is one: two runs may start in the same second.
    -> its name."""
    number = 1
    path = name
    while True:
        try:
            os.makedirs(path)
            return path
        except FileExistsError:
            number += 1
            path = f"{name}-{number}"

def reward_name(reward):
    """What config.json calls a reward, a function or a callable object."""
    return getattr(reward, "__name__", type(reward).__name__)

WHOLE = state_dict_api.StateDictOptions(full_state_dict=True, cpu_offload=True)

def save_checkpoint(out, model, tokenizer, optimizer, state):
    """Writes the model as a transformers folder, and all that a run needs to go on as
    checkpoint.pt. That one takes its name by a rename, so that a kill leaves the old one or the
    new. Whatever the logs gain after this point is cut off on resume."""
    reshard(model)  # the masters are what is saved
    weights, moments = state_dict_api.get_state_dict(model, optimizer, options=WHOLE)
    if not is_first_process():
        return
    kept = {index: vars(segment) for index, segment in state.kept.items()}
    saved = dict(
        step=state.step,
        weights=weights,
        optimizer=moments,
        values=torch.tensor(state.values.value),
        value_counts=torch.tensor(state.values.count),
        lengths=torch.tensor(state.lengths.value),
        length_counts=torch.tensor(state.lengths.count),
        kept=kept,
        metrics_size=(out / "metrics.jsonl").stat().st_size,
        rollouts_size=(out / "rollouts.jsonl").stat().st_size,
    )
    unfinished = out / "checkpoint.tmp"
    try:
        tokenizer.save_pretrained(out / "model")
        model.save_pretrained(out / "model", state_dict=dict(weights))  # it empties this copy
        torch.save(saved, unfinished)
        os.replace(unfinished, out / "checkpoint.pt")  # last: this counts as done
    except Exception as error:  # a full disk has many names
        unfinished.unlink(missing_ok=True)
        free = shutil.disk_usage(out).free / 1e9
        raise UserError(f"no checkpoint saved, an older one is untouched; {free:.1f} GB are free "
                        f"on the disk of {out}: {error}") from None

def load_checkpoint(out, model, optimizer, state, problems):
    """Puts model, optimizer, state and the logs back where `save_checkpoint` saw them."""
    path = out / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        size = len(saved["values"])
        if size != len(state.values.value):
            raise ValueError(f"it knows {size} problems, --data has {len(state.values.value)}")
        state.step = saved["step"]
        state.values.value[:] = saved["values"].numpy()
        state.values.count[:] = saved["value_counts"].numpy()
        state.lengths.value[:] = saved["lengths"].numpy()
        state.lengths.count[:] = saved["length_counts"].numpy()
        for index, segment in saved["kept"].items():
            state.kept[index] = Sample(**segment)
            if segment["prompt"] != problems[index].ids:
                raise ValueError("--data or --template is not what it was")
        state_dict_api.set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["weights"],
            optim_state_dict=saved["optimizer"],
            options=WHOLE,
        )
    except Exception as error:  # whatever a file may hold
        raise UserError(f"cannot resume from {path}: {error}") from None
    if is_first_process():
        for name in ("metrics", "rollouts"):
            log = out / f"{name}.jsonl"
            os.truncate(log, min(saved[f"{name}_size"], log.stat().st_size))

# -- the command line
def parse_config(argv):
    """The command line as a Config. What no flag sets is the paper's, but the embedded model, a
    machine without a GPU and a resumed run have defaults of their own. Config's comments are the
    help: they are read off its source."""
    comments = re.findall(r"    (\w+): .*?  # (.*)", inspect.getsource(Config))
    help_texts = dict(comments)
    for field_of_config in fields(Config):
        field_of_config.metadata = {"help": help_texts[field_of_config.name]}
    parser = transformers.HfArgumentParser(
        Config,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        description="Trains a language model to reason by SKPO, or evaluates it, and writes "
        "figures, texts and the model into a folder. The training defaults shown are the paper's. "
        "The embedded model, and any other on a machine without a GPU, start from smaller numbers.",
    )
    first = parser.parse_args(argv)
    saved = read_run_config(Path(first.out)) if first.resume and first.out else None
    if saved:
        known = {name: value for name, value in saved.items() if name in help_texts}
        parser.set_defaults(**known)
    elif first.model == "embedded":
        parser.set_defaults(**EMBEDDED)
    elif not torch.cuda.is_available():
        parser.set_defaults(**SMALL)
    config = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    if config.model != "embedded" and not torch.cuda.is_available() and not saved:
        explain_small_plan(config)
    return config

def explain_small_plan(config):
    """Says what a run without a GPU starts from."""
    c = config
    say("No GPU was found: where no flag says otherwise, a small plan stands in for the paper's.")
    if c.steps:
        say(f"It is {c.steps} steps, each of {c.prompts_per_step} prompts x {c.group_size} "
            f"responses of up to {c.max_new_tokens} tokens, lr {c.lr}.")
    say("--help shows every flag with the paper's value.")
    if c.steps and c.algo == "skpo" and c.w_up > 0.1:
        say(f"In small runs the upstream loss did harm at --w_up {c.w_up}: 0.1 or 0 is safer.")

def check_config(config):
    """Raises UserError, which says what to do, for flags that make no sense."""
    c = config
    for name, value in vars(c).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: it must be a number, 0 or more")
    for choice in fields(c):
        allowed = get_args(choice.type)  # of a Literal, else nothing
        if allowed and getattr(c, choice.name) not in allowed:
            raise UserError(f"--{choice.name} must be one of {', '.join(allowed)}")
    positive = [
        "lr", "tau", "init_length", "max_grad_norm", "explore_eps", "eval_samples", "micro_tokens",
        "max_new_tokens", "max_prompt_tokens", "prompts_per_step", "minibatches", "split_low",
    ]
    for name in positive:
        if not getattr(c, name):
            raise UserError(f"--{name} 0: it must be more than 0")
    if c.prompts_per_step % c.minibatches:
        raise UserError(f"--prompts_per_step {c.prompts_per_step} must be a multiple of "
                        f"--minibatches {c.minibatches}")
    if c.group_size < 2:
        raise UserError("--group_size: an advantage within a group needs at least 2 responses")
    if c.clip_low >= 1:
        raise UserError("--clip_low must be below 1")
    if not c.rho_min <= c.rho_max <= 1:
        raise UserError("--rho_min, --rho_max: rho_min <= rho_max <= 1 must hold")
    if not c.split_low <= c.split_high <= 1:
        raise UserError("--split_low, --split_high: split_low <= split_high <= 1 must hold")
    if c.temperature == 0 and c.steps:
        raise UserError("--temperature 0 is greedy: it can be evaluated (--steps 0), not trained")
    if c.algo == "grpo" and c.ablation != "none":
        raise UserError(f"--ablation {c.ablation} belongs to SKPO, not to --algo grpo")
    if c.resume and not (c.out and c.steps):
        raise UserError("--resume needs the run's folder, --out, and --steps above 0")
    is_path = c.model.startswith((".", "/", "~")) or c.model.count("/") > 1  # no name of a hub
    if is_path and not Path(c.model).is_dir():
        raise UserError(f"--model {c.model}: there is no such folder")
    if read_run_config(Path(c.model)):
        raise UserError(f"--model {c.model} is a run's folder: its model is in {c.model}/model")
    if c.model == "embedded" and not {c.data, c.eval_data} <= {"", "sums"}:
        raise UserError("the embedded model reads digits alone: --data and --eval_data need a "
                        "--model")
    for path in [c.data, *evaluation_sources(c)]:
        if path not in ("", "sums", "arithmetic") and not Path(path).is_file():
            raise UserError(f"there is no file {path}")

def main(argv=None, reward=math_reward):
    """Runs; a mistake of the user's ends in one line and an exit code that is not 0."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = parse_config(argv)
        train(config, reward)
        wait_for_all()  # none leaves while another still saves
        dist.destroy_process_group()
    except (UserError, OSError) as error:
        message = " ".join(f"skpo.py: {error}".split())
        sys.exit(escaped(message[:600]))
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("skpo.py: out of memory: lower --micro_tokens, --group_size or --max_new_tokens")
    except KeyboardInterrupt:
        sys.exit("skpo.py: interrupted; with --resume --out FOLDER it goes on from its last "
                 "checkpoint, if there is one")

if __name__ == "__main__":
    main()
