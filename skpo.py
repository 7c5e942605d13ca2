# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers>=4.57.1,<6", "numpy"]
# ///
"""SKPO, Skip-Connected Policy Optimization (Teng et al., arXiv 2604.08690), in one file.

    python skpo.py                                        # embedded tiny model and task, on a CPU
    python skpo.py --model Qwen2.5-0.5B --data train.jsonl --eval_data test.jsonl
    torchrun --standalone --nproc_per_node 8 skpo.py ...  # several GPUs

GRPO gives every token of a response the same credit; to value every prefix by sampling from it
takes hundreds of samples each before even the signs are right. SKPO values ONE prefix a prompt: a
segment s of reasoning, put AHEAD of the prompt, [s, q]. The mean reward of the G responses from
there is its Monte Carlo value. They are trained on their advantage within the group, s on its value
minus a running value of the prompt (SPO: Xu & Ding, arXiv 2509.13232). `training_step` has it in 11
steps. The paper writes both phases as one pass over a KV cache; here they are two rollouts, each
sharing its prompts' cache. `paper silent` marks a choice that it leaves open.
"""
import argparse
import ast
import inspect
import json
import math
import os
import random
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, Subnormal
from functools import lru_cache, partial
from html.entities import html5
from pathlib import Path
from typing import Literal

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # KV caches grow
import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig


# ---- 1. Config: Appendix C -----------------------------------------------------------------------

@dataclass
class Config:
    """Every knob, with the paper's value (Appendix C). The comment beside it is its --help."""
    Ablation = Literal["none", "no_skip", "no_mc", "fixed_split", "extreme_selection"]
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
    w_up: float = 0.5  # weight of the upstream loss (eq. 4), skpo only
    w_down: float = 0.5  # weight of the downstream loss (eq. 4), skpo only
    split_low: float = 1 / 6  # t_q is drawn between split_low * L_q ...
    split_high: float = 1 / 2  # ... and split_high * L_q
    init_length: float = 1024  # L_q of a prompt not seen yet, tokens
    rho_min: float = 0.875  # trackers: least memory, after a large move of the policy
    rho_max: float = 0.96  # trackers: most memory, after a small one
    tau: float = 8.0  # trackers: the divergence that halves the memory, nats
    explore_eps: float = 0.05  # added to the weight with which a prompt is drawn
    template: Literal["auto", "none"] = "auto"  # auto: ask for a box, in the chat template if any
    micro_tokens: int = 0  # tokens in a training pass; 0: 4096 on a GPU, 1024 on a CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; auto: bfloat16 on a GPU
    seed: int = 0  # the same seed gives the same numbers on the same machine, if it is a CPU
    eval_every: int = 50  # steps between evaluations, one before the first step too; 0: none
    eval_samples: int = 4  # k of avg@k, pass@k and maj@k: samples of each evaluation problem
    eval_problems: int = 0  # at most so many of each evaluation set; 0: all
    save_every: int = 50  # steps between checkpoints; 0: none
    resume: bool = False  # go on with the run in --out from its last checkpoint


# Defaults of the embedded model, and of any other one without a GPU. SMALL leaves the upstream loss
# out: in a run so small it is mostly noise (README, noise.py).
EMBEDDED = dict(steps=100, prompts_per_step=32, max_new_tokens=24, lr=3e-4, init_length=10)
SMALL = dict(steps=20, prompts_per_step=8, minibatches=2, group_size=4, max_new_tokens=128,
             lr=1e-5, w_up=0.0, init_length=64, eval_every=10, eval_samples=1, eval_problems=16,
             save_every=10)


@dataclass
class Sample:
    """What was sampled after a prompt, and its part in the loss."""
    tokens: list  # ids, EOS included
    logprobs: list  # nats, log pi_old of each token, as it was sampled
    finished: bool  # the last token is an EOS
    prompt: list = field(default_factory=list)  # ids: q for a segment, [s, q] for a response
    complete: list = field(default_factory=list)  # ids to grade and to measure, if more than tokens
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the mean of eq. 5 or 6
    upstream: bool = False  # trained by eq. 6, else by eq. 5


# ---- 2. Upstream (Section 3.1): split, cut, select; the skip connection --------------------------

def split_position(length, rng, low=1 / 6, high=1 / 2):
    """Where an upstream segment pauses: t_q ~ Uniform[low * L_q, high * L_q] (eq. 2).
    length: L_q, tokens; rng: NumPy's or random's -> int, tokens, at least 1."""
    return max(1, round(rng.uniform(low * length, high * length)))


def cut_segment(sample):
    """A segment that ended before its pause is cut to half of its length (Section 3.1).
    paper silent: EOS is not counted; an EOS on the very token of the pause is an end."""
    if not sample.finished:
        return sample
    half = max(1, (len(sample.tokens) - 1) // 2)
    return replace(sample, tokens=sample.tokens[:half], logprobs=sample.logprobs[:half],
                   finished=False, complete=sample.tokens)


def select_segment(logprobs, target=np.median):
    """The segment of median surprise (Section 3.1): d(s) = mean_t -log pi(s_t | q, s_<t).
    logprobs: G lists of nats -> index of the d nearest to the median, the first on a tie. target:
    what to be nearest to; an ablation puts np.min (likeliest) or np.max."""
    d = [-np.mean(segment) for segment in logprobs]  # [G], nats a token
    gap = np.abs(d - target(d))
    nearest = gap <= gap.min() + 1e-9  # with an even G the two middle ones tie, but for rounding
    return int(nearest.argmax())  # the first


def skip_prompt(segment, prompt, bos_token_id=None):
    """The skip connection (Section 3.1): [s, q], the segment FIRST, then the whole prompt; lists
    of ids. paper silent: joined as they are; only a BOS that opens q moves to the very front."""
    bos = 1 if prompt[:1] == [bos_token_id] else 0
    return prompt[:bos] + segment + prompt[bos:]


# ---- 3. Values and trackers (Sections 3.1, 3.2; SPO); the choice of prompts ----------------------

def monte_carlo_value(rewards):
    """R_I(s, a) = mean_i R_II(o_i, a) (eq. 3): the value of a segment from the rewards of the
    responses that follow it, at no further cost. [B, G] of +-1 -> [B] in [-1, 1]."""
    return torch.as_tensor(rewards).double().mean(-1)


class Tracker:
    """A running mean per prompt, one for V(q) in [-1, 1], one for L_q in tokens (SPO eq. 5-7):
    x <- x + eta (observation - x), eta = 1 / (rho N + 1), N <- rho N + 1. It forgets faster the
    further the policy moved. value [size]; count [size]: N, 0 for a prompt not seen yet."""

    def __init__(self, size, initial, rho_min=0.875, rho_max=0.96, tau=8.0):
        self.value = np.full(size, float(initial))
        self.count = np.zeros(size)
        self.rho_min = rho_min
        self.rho_max = rho_max
        self.tau = tau

    def update(self, indices, observations, divergences):
        """indices [B], distinct; observations [B]; divergences [B]: D since the last visit, nats.
        With the paper's tau of 8 nats rho is rho_max at nearly every visit: the memory is all but
        constant, 1 / (1 - 0.96) = 25 observations long."""
        D = np.asarray(divergences, float)
        rho = np.clip(2.0 ** (-D / self.tau), self.rho_min, self.rho_max)
        N = rho * self.count[indices] + 1
        error = np.asarray(observations, float) - self.value[indices]
        self.value[indices] += error / N  # the first observation replaces the initial value
        self.count[indices] = N


def choose_prompts(values, n, rng, eps=0.05):
    """n distinct prompts, those of middling value most often: weight sqrt(v (1 - v)) + eps with
    v = (1 + V) / 2 (SPO eq. 11). values [size] in [-1, 1] -> n indices."""
    variance = np.clip(1 - values**2, 0, None) / 4  # v (1 - v)
    weight = np.sqrt(variance) + eps
    p = weight / weight.sum()
    return rng.choice(len(values), n, replace=False, p=p)


# ---- 4. Advantages and losses (Section 3.2) ------------------------------------------------------

def group_advantages(rewards):
    """Downstream: A_i = (R_i - mean R) / std R within each group; 0, not NaN, where all its R are
    equal. [B, G] -> [B, G]. paper silent: the population's std, without an epsilon."""
    R = torch.as_tensor(rewards).double()
    mean = R.mean(-1, keepdim=True)
    std = R.std(-1, correction=0, keepdim=True)
    equal = std < 1e-9  # but for rounding
    return torch.where(equal, 0.0, (R - mean) / std)


def upstream_advantages(values, baselines):
    """Upstream: A = R_I - V(q), normalised over the batch (SPO). [B], [B] in [-1, 1] -> [B]."""
    A = torch.as_tensor(values).double() - torch.as_tensor(baselines)
    return group_advantages(A)  # here the group is the batch


def downstream_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.28):
    """J_down (eq. 5): -sum w sg(clip(r, 1 - low, 1 + high)) A log pi(o_t | [s, q], o_<t). The
    clipped ratio r = pi / pi_old is a constant: every token keeps a gradient. logprobs,
    old_logprobs (nats), weights [N, T], advantages [N] -> scalar. weights: 1 / (tokens of the
    prompt's G responses * prompts), 0 where padded, so that any cut into passes sums alike."""
    ratio = (logprobs.detach() - old_logprobs).exp()  # [N, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weights * clipped * advantages[:, None] * logprobs).sum()


def upstream_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.2):
    """J_up (eq. 6): -sum w min(r A, clip(r, 1 - low, 1 + high) A), PPO's: a token clipped in its
    advantage's direction loses its gradient. Shapes as in downstream_loss; weights: 1 / (tokens of
    the segment * prompts). paper silent: no Clip-Higher, Appendix C names it downstream."""
    ratio = (logprobs - old_logprobs).exp()  # [N, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    A = advantages[:, None]  # [N, 1]
    return -(weights * torch.minimum(ratio * A, clipped * A)).sum()


# ---- 5. The training step: Section 3, in its order -----------------------------------------------

@dataclass
class State:
    """What a run carries from step to step, beside the weights and the optimiser."""
    values: Tracker  # V(q), in [-1, 1]
    lengths: Tracker  # L_q, tokens
    last: dict  # prompt index -> the segment kept at its last visit
    step: int = 0


def skip_responses(sample, segments, tokenizer, config):
    """Steps 4 and 5: G complete responses from [s, q]. segments: B Samples -> [B][G] Samples.
    paper silent: each gets the full limit after [s, q], and L_q is measured without s."""
    bos = next(iter(tokenizer("")["input_ids"]), None)  # what opens every text, if anything does
    x = [skip_prompt(s.tokens, s.prompt, bos) for s in segments]  # [B] token ids
    return sample(x, config.group_size)


def training_step(model, tokenizer, optimizer, problems, state, config, split=split_position,
                  select=select_segment, respond=skip_responses, outcomes=None):
    """Steps 1 to 11 on B prompts; the last four arguments are what Table 2 replaces (`ablation`).
    problems: Problems with their prompts' ids. Returns the step's row of metrics.jsonl."""
    c = config
    rng, sample, log = begin(model, tokenizer, c, state.step)  # sample(prompts, n, limits): [P][n]

    # 1. Choose B distinct prompts. V is read here: step 8 wants the value from before step 11.
    chosen = choose_prompts(state.values.value, c.prompts_per_step, rng, c.explore_eps)  # [B]
    q = [problems[i].ids for i in chosen]  # [B] token ids
    V = state.values.value[chosen]  # [B]

    # 2. Upstream, phase I: G segments a prompt, each paused at t_q (eq. 2), or cut to half.
    L_q = state.lengths.value[chosen]  # [B], tokens
    t_q = [split(L, rng, c.split_low, c.split_high) for L in L_q]  # [B], tokens
    drawn = sample(q, c.group_size, np.minimum(t_q, c.max_new_tokens))  # [B][G]

    # 3. Select the segment of median surprise, drop the others.
    segments = []  # [B]
    for group in drawn:
        group = [cut_segment(s) for s in group]
        index = select([s.logprobs for s in group])
        segments.append(group[index])

    # 4. and 5. Downstream, phase II: G responses from the skip-connected prompt [s, q].
    responses = respond(sample, segments, tokenizer, c)  # [B][G]

    # 6. Rewards, and the Monte Carlo value of the segment (eq. 3).
    answers = [problems[i].answer for i in chosen]
    R_II = grade(tokenizer, answers, responses)  # [B, G] of +-1
    R_I = monte_carlo_value(R_II)  # [B]
    if outcomes:
        R_I = outcomes(sample, segments, tokenizer, answers)

    # 7. and 8. Advantages.
    A_II = group_advantages(R_II)  # [B, G]
    A_I = upstream_advantages(R_I, V)  # [B]

    # 9. The loss (eq. 4) is a mean over tokens, then over the prompts of a mini-batch.
    # paper silent: eq. 5 is read as written, a mean over the tokens of a group; Appendix C's
    # "tokens contribute equally" could be one over the tokens of the mini-batch. EOS counts.
    per_batch = c.prompts_per_step // c.minibatches  # prompts in a mini-batch
    for s, group, A_s, A_group in zip(segments, responses, A_I.tolist(), A_II.tolist()):
        s.upstream = True
        s.advantage = A_s
        s.weight = 1 / (len(s.tokens) * per_batch)  # eq. 6
        tokens = sum(len(o.tokens) for o in group)
        for o, A in zip(group, A_group):
            o.advantage = A
            o.weight = 1 / (tokens * per_batch)  # eq. 5

    # How far pi has moved since it last saw q, for step 11; step 10 moves it again.
    before = [state.last.get(i, s) for i, s in zip(chosen.tolist(), segments)]  # first visit: s
    drift = policy_drift(model, before, c)  # [B], nats

    # 10. One optimiser step a mini-batch.
    groups = [[s] + group for s, group in zip(segments, responses)]  # [B][1 + G]
    learn(model, optimizer, groups, responses, R_II, c, log)

    # 11. Trackers; the segments are kept to measure the drift at the next visit.
    lengths = [np.mean([len(o.complete or o.tokens) for o in group]) for group in responses]  # [B]
    state.values.update(chosen, R_I, drift)
    state.lengths.update(chosen, lengths, drift)
    state.last.update(zip(chosen.tolist(), segments))

    noise = (1 - R_I**2).mean() / (c.group_size - 1)  # variance that sampling G responses adds
    variance = (R_I - torch.tensor(V)).var(correction=0)  # of the upstream advantage, raw
    log["mc_noise"] = (noise / variance).item() if variance else None
    log["mc_value"] = R_I.mean().item()
    log["segment_tokens"] = np.mean([len(s.tokens) for s in segments])
    return log


def policy_drift(model, segments, config):
    """D: how far pi moved since it last acted on each prompt, the mean over the tokens of the
    segment kept then of |log pi_then - log pi_now|. B Samples -> [B] nats. paper silent: after
    SPO's code, but on s alone (SPO: the whole response) and before the update (SPO: after it)."""
    @torch.no_grad()
    def moved(mine):
        D = np.zeros(len(mine))
        for rows in micro_batches(mine, config.micro_tokens):
            batch = [mine[i] for i in rows]
            now, then, _, mask = sample_logprobs(model, batch, config.temperature)  # [N, T]
            D[rows] = ((then - now).abs().sum(1) / mask.sum(1)).cpu()
        return D.tolist()
    return spread(moved, segments)


# ---- 6. Update: one optimiser step, cut into passes ----------------------------------------------

def update(model, optimizer, samples, config):
    """One optimiser step on the loss of a mini-batch of Samples (eq. 4). What has no advantage has
    no gradient and is not run; the weights have counted it. paper silent: with no advantage at all
    no step is taken, for AdamW's moments and decay would move the weights.
    Returns sums over the tokens run, and the norm of the gradient before it is clipped."""
    join_processes()
    c = config
    part = {True: c.w_up, False: c.w_down}
    rows = [s for s in samples if s.advantage and part[s.upstream]]
    sums = torch.zeros(4, device=model.device)  # tokens, ratios, clipped ones, entropies
    each_shard(model, "unshard")
    for indices, real in my_passes(micro_batches(rows, c.micro_tokens)):  # real: 1, else 0
        batch = [rows[i] for i in indices]
        logprobs, old, entropy, mask = sample_logprobs(model, batch, c.temperature)  # [N, T]
        A = logprobs.new_tensor([s.advantage for s in batch])  # [N]
        weights = mask * logprobs.new_tensor([[s.weight * real] for s in batch])  # [N, T]
        up = torch.tensor([[s.upstream] for s in batch], device=mask.device)  # [N, 1]
        J_up = upstream_loss(logprobs, old, A, weights * up, c.clip_low, c.clip_low)
        J_down = downstream_loss(logprobs, old, A, weights * ~up, c.clip_low, c.clip_high)
        loss = c.w_up * J_up + c.w_down * J_down  # eq. 4
        loss.backward()

        ratio = (logprobs.detach() - old).exp()  # [N, T]
        high = torch.where(up, c.clip_low, c.clip_high)  # [N, 1]
        clipped = (ratio < 1 - c.clip_low) | (ratio > 1 + high)
        terms = torch.stack([mask, ratio * mask, clipped * mask, entropy])  # [4, N, T]
        sums += real * terms.sum((1, 2))
    dist.all_reduce(sums)
    log = dict(zip(("tokens", "ratio", "clip_fraction", "entropy"), sums.tolist()), grad_norm=0.0)
    if rows:
        shards = optimizer.param_groups[0]["params"]  # model.parameters() are gathered copies now
        log["grad_norm"] = torch.nn.utils.clip_grad_norm_(shards, c.max_grad_norm).item()
        if not math.isfinite(log["grad_norm"]):
            raise UserError("the gradient is not a finite number: --resume with a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        each_shard(model, "reshard")
    return log


def learn(model, optimizer, groups, responses, rewards, config, log):
    """Step 10: `update` on each mini-batch of prompts; the step's row of metrics.jsonl. groups: B
    lists of Samples, a prompt each; responses [B][G]; rewards [B, G].
    paper silent: the warm-up counts training steps, not optimiser steps."""
    log["rollout_seconds"] = time.perf_counter() - log["start"]
    log["lr"] = config.lr * min(1.0, log["step"] / max(1, config.warmup_steps))
    optimizer.param_groups[0]["lr"] = log["lr"]
    sums = Counter()
    for part in np.split(np.arange(len(groups)), config.minibatches):
        batch = sum([groups[b] for b in part], [])
        sums.update(update(model, optimizer, batch, config))
    for name in ("clip_fraction", "ratio", "entropy"):
        log[name] = sums[name] / sums["tokens"] if sums["tokens"] else None  # nothing to train on
    every = sum(responses, [])
    log.update(
        reward=rewards.mean().item(),
        accuracy=(rewards > 0).double().mean().item(),
        zero_advantage=(rewards == rewards[:, :1]).all(1).double().mean().item(),
        response_tokens=np.mean([len(o.complete or o.tokens) for o in every]),
        truncated=np.mean([not o.finished for o in every]),
        grad_norm=sums["grad_norm"] / config.minibatches,
        peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9,
        seconds=time.perf_counter() - log.pop("start"),
    )
    log["update_seconds"] = log["seconds"] - log["rollout_seconds"]


def sample_logprobs(model, samples, temperature):
    """Of N Samples, [N, T]: log pi now (with gradients) and as sampled, entropy, nats; the mask."""
    logprobs, entropy, mask = response_logprobs(
        model, [s.prompt for s in samples], [s.tokens for s in samples], temperature)
    old, _ = pad([s.logprobs for s in samples], model.device, dtype=torch.float32)
    return logprobs, old, entropy, mask


def micro_batches(samples, limit):
    """Cuts N Samples into passes of at most `limit` tokens, padding counted, and a prompt that rows
    share counted once; a longer row goes alone. Returns lists of row indices."""
    def order(i):  # like lengths together (a class spans a factor of sqrt 2), then equal prompts
        return round(2 * math.log2(len(samples[i].tokens))), samples[i].prompt

    passes = []
    for i in sorted(range(len(samples)), key=order):
        rows = passes[-1] + [i] if passes else [i]
        prompts = {tuple(samples[j].prompt) for j in rows}
        tokens = len(rows) * max(len(samples[j].tokens) for j in rows)
        tokens += len(prompts) * max(map(len, prompts))
        if passes and tokens <= (limit or PASS_TOKENS):
            passes[-1] = rows
        else:
            passes.append([i])
    return passes


# ---- 7. The baseline, and the ablations of Table 2 -----------------------------------------------

def grpo_step(model, tokenizer, optimizer, problems, state, config):
    """GRPO as published (Shao et al. 2024), the paper's baseline: G responses from q, PPO-clip at
    1 +- clip_low (eq. 6's form) on the group's advantages, a mean over the tokens of a response,
    then over responses, no KL. paper silent: prompts are chosen as for SKPO, with D = 0."""
    c = config
    rng, sample, log = begin(model, tokenizer, c, state.step)
    chosen = choose_prompts(state.values.value, c.prompts_per_step, rng, c.explore_eps)  # [B]
    responses = sample([problems[i].ids for i in chosen], c.group_size)  # [B][G]
    R = grade(tokenizer, [problems[i].answer for i in chosen], responses)  # [B, G]
    rows = c.prompts_per_step // c.minibatches * c.group_size
    for group, A_group in zip(responses, group_advantages(R).tolist()):
        for o, A in zip(group, A_group):
            o.upstream = True  # the form of eq. 6
            o.advantage = A
            o.weight = 1 / (len(o.tokens) * rows)
    learn(model, optimizer, responses, responses, R, replace(c, w_up=1.0), log)
    state.values.update(chosen, R.mean(1), np.zeros(len(chosen)))
    return log


def continued_responses(sample, segments, tokenizer, config):
    """no_skip: G responses go on from [q, s]. paper silent: s + o is graded and measured, and kept
    within the limit."""
    limits = [max(1, config.max_new_tokens - len(s.tokens)) for s in segments]
    responses = sample([s.prompt + s.tokens for s in segments], config.group_size, limits)
    for s, group in zip(segments, responses):
        for o in group:
            o.complete = s.tokens + o.tokens
    return responses


def own_outcomes(sample, segments, tokenizer, answers):
    """no_mc: the outcome of one continuation from [q, s], or of the segment that ended by itself
    -> [B]. paper silent: V(q) follows it too; the continuation has the full limit."""
    paused = [s for s in segments if not s.complete]
    onward = sample([s.prompt + s.tokens for s in paused], 1)  # [P][1]
    for s, (o,) in zip(paused, onward):
        s.complete = s.tokens + o.tokens
    return grade(tokenizer, answers, [[s] for s in segments])[:, 0]


def ablation(config, step):
    """What `training_step` takes in place of the paper's pieces."""
    end = [config.split_low, config.split_high][step % 2]
    extreme = [np.min, np.max][step % 2]
    return {
        "none": {},
        "no_skip": dict(respond=continued_responses),
        "no_mc": dict(outcomes=own_outcomes),
        "fixed_split": dict(split=lambda length, *_: max(1, round(end * length))),
        "extreme_selection": dict(select=partial(select_segment, target=extreme)),
    }[config.ablation]


# ---- 8. Rollouts, log-probs, evaluation ----------------------------------------------------------

NAMES = inspect.signature(transformers.Qwen2Model.forward).parameters
CACHE = "cache" if "cache" in NAMES else "past_key_values"  # what transformers calls it, by version
BAR = dict(leave=False, disable=os.environ.get("RANK", "0") != "0" or None)  # None: if a terminal
CHUNK = 16  # tokens sampled between two looks at which rows have ended
PASS_TOKENS = 4096 if torch.cuda.is_available() else 1024  # a CPU is as fast with small passes


def pad(rows, device, side="right", dtype=torch.long):
    """Lists -> (values [N, T], mask [N, T] of bool), T at least 2. The mask is of lengths, never of
    values: a pad id may be an EOS id."""
    rows = [torch.tensor(row, dtype=dtype) for row in rows] + [torch.zeros(2, dtype=dtype)]
    values = pad_sequence(rows, True, padding_side=side)[:-1]
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side=side)[:-1]
    return values.to(device), mask.to(device, torch.bool)


def prefill(model, prompts):
    """P prompts (lists of ids), padded at the left: (cache, ids [P, S], mask [P, S]); the cache has
    the keys and values of all but the last token. With gradients on it carries them: in training
    too one forward pass of a prompt serves all the rows that follow it."""
    ids, mask = pad(prompts, model.device, "left")
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(0)
    model.base_model(ids[:, :-1], attention_mask=mask[:, :-1].long(), use_cache=True,
                     position_ids=positions[:, :-1], **{CACHE: cache})
    if cache.get_seq_length() == 0:  # gradient checkpointing in train() mode drops it silently
        raise ValueError("the KV cache stayed empty")
    return cache, ids, mask


@torch.no_grad()
def generate(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0):
    """n samples of each prompt (lists of ids, of any lengths) from softmax(logits / temperature)
    and nothing else; 0 is greedy. max_new_tokens: an int, or one a prompt. -> [P][n] Samples.
    Keys and values of a prompt are computed once; rows that have ended leave the batch; prompts
    take turns where the memory is short."""
    if not prompts:
        return []
    limits = np.broadcast_to(max_new_tokens, len(prompts)).tolist()
    half = len(prompts) // 2
    if half and rows_that_fit(model, max(map(len, prompts)) + max(limits)) < len(prompts) * n:
        first = generate(model, tokenizer, prompts[:half], n, limits[:half], temperature)
        return first + generate(model, tokenizer, prompts[half:], n, limits[half:], temperature)
    groups = [[Sample([], [], False, p) for _ in range(n)] for p in prompts]
    rows = [(s, limit) for group, limit in zip(groups, limits) for s in group]  # [P * n]
    eos = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id)} - {None}
    cache, ids, mask = prefill(model, prompts)  # [P, S]
    ids = ids.repeat_interleave(n, 0)  # [P * n, S]
    mask = mask.repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    bar = tqdm(desc="sampling", unit=" tokens", **BAR)
    own = model.generation_config  # it steps aside: its top_k, penalties and the like are not pi
    model.generation_config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0 if temperature else None,
        eos_token_id=sorted(map(int, eos)) or None, pad_token_id=0, output_scores=True,
        return_dict_in_generate=True)
    while rows:
        longest = max(limit - len(s.tokens) for s, limit in rows)
        out = model.generate(ids, attention_mask=mask.long(), max_new_tokens=min(CHUNK, longest),
                             synced_gpus=False, **{CACHE: cache})
        tokens = out.sequences[:, ids.shape[1]:]  # [N, drawn]
        logprobs = []  # drawn of [N]; zip, for where transformers stops a step late it drops a draw
        for scores, token in zip(out.scores, tokens.T):
            logit = scores.gather(1, token[:, None]).squeeze(1)  # [N]
            logprobs.append(logit - scores.logsumexp(1))
        logprobs = torch.stack(logprobs, 1).tolist()  # [N][drawn]
        staying = []
        for j, ((s, limit), new) in enumerate(zip(rows, tokens.tolist())):
            new = new[:limit - len(s.tokens)]
            ends = [t + 1 for t, token in enumerate(new) if token in eos]
            new = new[:min(ends, default=None)]
            s.finished = bool(ends)
            s.tokens += new
            s.logprobs += logprobs[j][:len(new)]
            bar.update(len(new))
            if not s.finished and len(s.tokens) < limit:
                staying.append(j)
        bar.set_postfix_str(f"{len(staying)} responses go on")
        rows = [rows[j] for j in staying]
        keep = torch.tensor(staying, dtype=torch.long, device=ids.device)
        ids = out.sequences[keep]  # [fewer, T + drawn]
        del out  # its logits are large
        mask = torch.cat([mask, torch.ones_like(tokens, dtype=torch.bool)], 1)[keep]
        cache.batch_select_indices(keep)
    bar.close()
    model.generation_config = own
    return groups


def rows_that_fit(model, length):
    """How many rows of `length` tokens may be sampled at once: by the keys and values of a token of
    this model, and a row's logits."""
    cache, _, _ = prefill(model, [[0, 0]])
    token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    memory = 4e9  # a constant on a CPU, so that the same seed gives the same numbers
    if model.device.type == "cuda":
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        memory = 0.7 * (torch.cuda.mem_get_info()[0] + idle)
    logits = 4 * (CHUNK + 4) * len(model.get_output_embeddings().weight)  # float32
    return memory // (token * (length + CHUNK) + logits)


def response_logprobs(model, prompts, responses, temperature=1.0):
    """log pi(o_t | prompt, o_<t) of each response token, with gradients: N prompts, N responses,
    lists of ids; equal prompts are run once. Returns logprobs and the entropy of each token's
    distribution (without gradients), nats, [N, T] float32, 0 where padded, and the mask [N, T]."""
    shared = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    owner = torch.tensor([shared[tuple(p)] for p in prompts], device=model.device)  # [N]
    cache, x, seen = prefill(model, list(shared))  # [P, S]
    cache.batch_select_indices(owner)  # P -> N rows
    targets, mask = pad(responses, model.device)  # [N, T]
    ids = torch.cat([x[owner, -1:], targets[:, :-1]], 1)  # [N, T]: the prompt's last token first
    seen = torch.cat([seen[owner], mask[:, :-1]], 1)  # [N, S + T - 1]
    positions = seen.cumsum(1)[:, -ids.shape[1]:] - 1  # [N, T]
    hidden = model.base_model(ids, attention_mask=seen.long(), position_ids=positions,
                              use_cache=True, **{CACHE: cache}).last_hidden_state  # [N, T, D]
    logprobs, entropy = chunked_logprobs(
        model.get_output_embeddings(), hidden[mask], targets[mask], temperature)  # [sum of lengths]
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy), mask


def chunked_logprobs(head, hidden, targets, temperature=1.0, chunk=1024):
    """Of p = softmax(head(hidden) / temperature): log p[target] with gradients, and the entropy of
    p without, nats. hidden [M, D], targets [M] -> two [M], float32. A chunk's logits [chunk, V]
    live only while they are used: the backward pass computes them again."""
    def piece(h, target):
        table = (head(h).float() / temperature).log_softmax(1)  # [m, V]
        entropy = torch.special.entr(table.detach().exp()).sum(1)  # [m]
        return table.gather(1, target[:, None]).squeeze(1), entropy
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    parts = [checkpoint(piece, h, target, use_reentrant=False) for h, target in chunks]
    return [torch.cat(x) for x in zip(*parts)]


def evaluate(model, tokenizer, problems, config):
    """k samples of each of P problems, from q alone, without a segment. accuracy: avg@k, the share
    of right ones; pass_at_k: of problems with a right one; majority: maj@k, of problems whose most
    frequent answer is right."""
    _, sample, _ = begin(model, tokenizer, config, 10**9)  # the same draws at every evaluation
    k = config.eval_samples if config.temperature else 1
    groups = sample([p.ids for p in problems], k)  # [P][k]
    right = grade(tokenizer, [p.answer for p in problems], groups) > 0  # [P, k]
    majority = []
    for p, group in zip(problems, groups):
        boxes = [extract_answer(decode(tokenizer, s)) for s in group]
        votes = Counter(normal_form(box) for box in boxes if box is not None)
        winner = max(votes, key=votes.get, default=None)
        majority.append(winner == normal_form(p.answer))
    return dict(accuracy=right.double().mean().item(), majority=float(np.mean(majority)),
                pass_at_k=right.any(1).double().mean().item(), samples=k, problems=len(problems))


def decode(tokenizer, sample):
    """The text of a response, whole."""
    return tokenizer.decode(sample.complete or sample.tokens, skip_special_tokens=True)


def grade(tokenizer, answers, groups):
    """+1 where the last box of a response holds the answer, else -1: [B][n] Samples -> [B, n]."""
    rewards = [[1.0 if is_correct(decode(tokenizer, s), answer) else -1.0 for s in group]
               for answer, group in zip(answers, groups)]
    return torch.tensor(rewards, dtype=torch.float64)


# ---- 9. Rewards: is the last box right? ----------------------------------------------------------
# Answers are equal if their normal forms are. Model output is untrusted: LaTeX becomes Python,
# which is parsed and never run; a number beyond 10^+-100 is an error, and the text compared.

NUMBERS = Context(prec=300, Emin=-100, Emax=100,
                  traps=[Overflow, Subnormal, DivisionByZero, InvalidOperation])
ROUNDED = Context(prec=210)  # what is compared
NAME = re.compile(r"(?:^|(?<=,))\s*((?:\\?[a-zA-Z]|\\[a-z]+|[A-Z]{2,3})(?:_\w|_\{\w+\})?"
                  r"(?:\([a-zA-Z]\))?|\([a-z](?:\s*,\s*[a-z])*\))\s*(?:=|\\in(?![a-zA-Z]))")
UNIT = (r"(?:(?:square|cubic) )?(?:[cmk]m|in|ft|feet|kg|mph|percent|inch(?:es)?|(?:meter|gram|mile|"
        r"unit|pound|hour|minute|second|day|week|year|dollar|cent|degree|liter|point)s?)")
DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°")
TIDY = [
    (r"[.\s]+$", ""), (r"infinity|\\infty(?![a-zA-Z])|∞", " Ω "), ("−", "-"),
    (r"\\begin\{[pb]?matrix\}", "(("), (r"\\\\(?!\s*\\end)", "),("), ("&", ","),
    (r"(?:\\\\)?\s*\\end\{[pb]?matrix\}", "))"),
    (r"(?<=\d)(?:\{,\}|,?\\!|\\,)\s*(?=\d{3}(?!\d))", ""),  # between thousands, not a space
    (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?|q?quad)(?![a-zA-Z])|\\[!,;:> ()]|~", " "),
    (r"\\?[%$]", " "),  # a space, so that \$1\$2 is not 12
    (r"(?s)^(?!.*(?:sin|cos|tan|sec|csc|cot)).*", lambda m: DEGREES.sub(" degrees", m[0])),
    (r"\\(?:cdot|times)(?![a-zA-Z])", "*"), (r"\\div(?![a-zA-Z])", "/"),
    (r",?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
    (r"\\(?:(?:text|math)\w*|mbox|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
    (rf"(?:(?<=[\d}})])|(?<=\\pi))\s*{UNIT}(?:\s*\^\s*\{{?[23]\}}?|\s*[CF])?\s*(?=,|$)", ""),
    (r"^\s*[-+]?\d{1,3}(,\d{3})+(\.\d+)?\s*$", lambda m: m[0].replace(",", "")),  # not 12, 144
]
NESTED = [  # applied again and again, the inner ones go first
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\sqrt\s*(?:\{([^{}]*)\}|\(([^()]*)\))", r"((\1\2)^(1/2))"),
    (r"\\sqrt\s*\[([^][]*)\]\s*\{([^{}]*)\}", r"((\2)^(1/(\1)))"),
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
]
PYTHON = [
    (r"(?<![\w.])0+(?=[0-9])", ""),  # 033 is no number of Python's
    (r"(?<![\\a-zA-Z])(sqrt|pi)(?![a-zA-Z])", r"\\\1 "), (r"_\{(\w)\}(?!\w)", r"_\1"),
    (r"\\[dtc](frac|binom)", r"\\\1"), (r"\\(frac|sqrt)\s*(\d)", r"\\\1{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"(?<![\d.^_/])(?<!\d )(\d+) +(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),  # mixed numbers
    (r"(?<![\d.^_])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(\d)[eE]([-+]?\d{1,2})(?![\d.])", r"\1*10^(\2)"), (r"(?<=\d)_", " _"),  # no 1_2 for 12
    (r"(?<![\w.)])(?<!!!)(\d\d?)!(?!!)", lambda m: f"({math.factorial(int(m[1]))})"),
    (r"\[([^][()]*)\)", r"([],\1)"), (r"\(([^][()]*)\]", r"((),\1)"),  # half open intervals
    (r"\\cup(?![a-zA-Z])", "|"),
    *8 * NESTED,
    (r"\\([a-z]+)(?![a-zA-Z])", lambda m: html5.get(m[1] + ";", m[0])), (r"\\([{}])", r"\1"),
    (r"(?<=[^\W_]|\))\s*(?=[^\W\d_]|\()", "*"), (r"\^", "**"),
]


def extract_answer(text):
    r"""What the last complete \boxed{...} in text holds; None if none or empty. One pass."""
    box = (0, 0)  # start, end
    starts = []  # of what is in the open braces, -1 without \boxed
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0].endswith("{") and token[0] != r"\{":
            starts.append(token.end() if len(token[0]) > 1 else -1)
        elif token[0] == "}" and starts:
            box = max(box, (starts.pop(), token.start()))  # of nested boxes, the inner one
    return text[slice(*box)].strip() or None


def is_correct(response, answer):
    """Whether the last box of response (text) holds answer (text or number). Never raises."""
    given = extract_answer(response)
    return given is not None and normal_form(given) == normal_form(str(answer))


@lru_cache(10**4)  # a reference is compared with every response to it
def normal_form(text):
    """What equal answers share: a Decimal, a nested tuple of them, or the text tidied. Hashable."""
    if len(text) > 300:
        return text
    for pattern, new in TIDY:
        text = re.sub(pattern, new, text)
    if len(set(NAME.findall(text))) == 1:  # of several, x = 1, y = 2, they matter
        text = NAME.sub("", text)
    if re.fullmatch(r"[a-zA-Z][a-zA-Z ]+", text.strip()):  # words are no products of letters
        return " ".join(text.casefold().split())
    for pattern, new in PYTHON:
        text = re.sub(pattern, new, text)
    try:
        text = f"[{text.strip()}]"
        items = ast.parse(text, mode="eval").body.elts
        whole = items if len(items) == 1 else [ast.Set(items)]  # a bare list has no order
        forms = [form(ast.List(whole), text, sign)[1] for sign in (1, -1)]  # |x| is not x
    except Exception:  # no expression, or too large
        return "".join(text.split())
    return forms[0] if forms[0] == forms[1] else ("values", *forms)


def power(left, right):
    """left^right; an odd root of a negative number is the real one."""
    if left < 0 and right % 1:
        odd = ROUNDED.divide(1, right) % 2 == 1
        sign = -1 if odd else Decimal("1.37")  # i to that power: some number, no real one
        return NUMBERS.multiply(sign, power(-left, right))
    return NUMBERS.power(left, right)


def union(left, right):
    """left \\cup right, two tuples of the kind that form gives, in an order of its own."""
    parts = [x[1:] if x[0] == "union" else (x,) for x in (left, right)]
    return ("union", *sorted(sum(parts, ()), key=str))


OPERATORS = {ast.Add: NUMBERS.add, ast.Sub: NUMBERS.subtract, ast.Mult: NUMBERS.multiply,
             ast.Div: NUMBERS.divide, ast.Pow: power, ast.BitOr: union,
             ast.UAdd: NUMBERS.add, ast.USub: NUMBERS.subtract}


def form(node, text, sign):
    """Of a part of the parsed text: a number, its letters being numbers of that sign, or a tuple of
    forms, its numbers rounded, a set's sorted."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        items = [form(item, text, sign) for item in node.elts]
        items = [x if isinstance(x, tuple) else ROUNDED.normalize(x) for x in items]
        if isinstance(node, ast.Set):
            items.sort(key=str)
        return (type(node).__name__, *items)
    if isinstance(node, ast.BinOp):
        left = form(node.left, text, sign)
        return OPERATORS[type(node.op)](left, form(node.right, text, sign))
    if isinstance(node, ast.UnaryOp):
        return OPERATORS[type(node.op)](0, form(node.operand, text, sign))
    if isinstance(node, ast.Name) and re.fullmatch(r"\w(_\w)?", node.id):
        constants = {"e": math.e, "π": math.pi}
        return Decimal(constants.get(node.id) or sign * random.Random(node.id).uniform(1, 2))
    return NUMBERS.create_decimal(ast.get_source_segment(text, node))  # not through a float


# ---- 10. Problems, prompts, the model ------------------------------------------------------------

class UserError(Exception):
    """A mistake that its maker can mend: shown as one line, without a traceback."""


@dataclass
class Problem:
    """A question, its reference answer and, once it is tokenised, the ids of its prompt."""
    question: str
    answer: str
    ids: list = None


def load_problems(source):
    """The Problems of a JSON-lines file ("question" or "problem", and "answer": text, number, or
    GSM8K's "... #### 18"), or of a built-in set: "sums", the embedded model's, six digits to add
    one by one, modulo 10; "arithmetic", for a pretrained one. Raises UserError."""
    rng = np.random.default_rng(20260409)
    if source == "sums":
        digits = map("{:06d}".format, rng.permutation(10**6)[:2048])
        return [Problem(d, str(sum(map(int, d)) % 10)) for d in digits]
    if source == "arithmetic":
        triples = np.unique(rng.integers(2, 100, (2048, 3)), axis=0).tolist()
        return [Problem(f"What is {a} + {b} * {c}?", str(a + b * c)) for a, b, c in triples]
    problems = []
    for number, line in enumerate(Path(source).read_bytes().splitlines(), 1):
        try:
            if not line.strip():
                continue
            row = json.loads(line)
            question = row.get("question", row.get("problem")).encode(errors="replace").decode()
            answer = str(row["answer"]).rsplit("####", 1)[-1].strip()
            answer = extract_answer(answer) or answer
            if not question.strip() or not answer or type(row["answer"]) not in (str, int, float):
                raise ValueError("empty")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise UserError(f'{source}, line {number}: not a JSON object with a "question" or '
                            '"problem" (text) and an "answer" (text or number)') from None
        problems.append(Problem(question, answer))
    return problems


def prompt_ids(tokenizer, question, template="auto"):
    """The ids of a prompt: for "none" the question as it is, for "auto" with a request for a box,
    in the tokenizer's chat template if it has one."""
    if template == "auto":
        question += "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
    if template == "auto" and tokenizer.chat_template:
        messages = [{"role": "user", "content": question.strip()}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                  return_dict=False, date_string="1 Jan 2026"))
    ids = tokenizer(question)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some close every text


def load_model(config):
    """(model, tokenizer), float32, on the GPU if there is one. config.model: "embedded", a folder,
    or a hub name, whose organisation may be left out. No remote code, no pickle."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.model == "embedded":
        warm_up = {"steps": 0} if config.resume else {}  # a checkpoint brings its own weights
        model, tokenizer = embedded_model(config.seed, **warm_up)
        return model.to(device), tokenizer
    source = config.model
    homes = dict(qwen="Qwen", llama="meta-llama", smollm="HuggingFaceTB", gemma="google")
    family = re.match("[a-z]*", source.lower())[0]
    if "/" not in source and family in homes and not Path(source).exists():
        source = f"{homes[family]}/{source}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32,
                                                     use_safetensors=True)
        model = model.eval().to(device)  # no dropout: pi at the update is the pi that sampled
        check_policy(model)
        prompt_ids(tokenizer, "", config.template)  # a chat template may refuse
    except Exception as error:  # folders, hubs and architectures have many ways to be wrong
        raise UserError(f"cannot use --model {source}: {error or repr(error)}") from None
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model, tokenizer


@torch.no_grad()
def check_policy(model):
    """ValueError unless log-probs through a shared cache are a plain forward pass's: they are not
    with recurrent states, logits capped or scaled after the head, or broken weights."""
    rows = [[1, 2, 3], [3, 1], [1, 2, 3]]
    shared, _, _ = response_logprobs(model, rows, [[4], [5, 4], [4]])  # [3, 2]
    ids = torch.tensor([[3, 1, 5, 4]], device=model.device)
    plain = model(ids).logits[0].float().log_softmax(-1)[[1, 2], [5, 4]]  # [2]
    if not torch.allclose(shared[1], plain, atol=1e-3):
        raise ValueError("log-probs through a shared KV cache are not those of a plain pass")


def embedded_model(seed, steps=400, batch=64, slips=0.2):
    """A character-level Qwen2 of 75k parameters that stands in for a pretrained model: supervised
    for seconds on worked digit sums in which every fifth step slips, so that it knows how, yet is
    often wrong. In half of the documents an attempt stands ahead of the problem, as in [s, q]."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    words = [*"0123456789=", "\\boxed{", "}", "<eos>", "<unk>"]
    vocab = dict(zip(words, range(len(words))))
    chars = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    chars.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    chars.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chars, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'].split('\\n')[0] }}="  # the digits and "="
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=vocab["<eos>"],
        pad_token_id=vocab["<eos>"], initializer_range=0.1))  # with 0.02 it starts ten times later
    rng = np.random.default_rng([seed, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in tqdm(range(steps), "warm-up of the embedded model", **BAR):
        digits = rng.integers(10, size=(batch, 6))
        slip = rng.integers(1, 10, (batch, 6)) * (rng.random((batch, 6)) < slips)
        work = (digits + slip).cumsum(1) % 10  # [batch, 6]: running sums, a slip carried on
        attempt = (work + slip[::-1]) % 10  # [batch, 6]: the same with another row's slips
        cut = rng.integers(1, 7, batch) * (rng.random(batch) < 0.5)  # [batch]; 0: nothing ahead
        texts = []
        for a, n, d, w in zip(attempt.tolist(), cut, digits.tolist(), work.tolist()):
            texts.append([*a[:n], *d, 10, *w, 11, w[-1], 12, 13])  # a d = w \boxed{ w_6 } <eos>
        ids, mask = pad(texts, "cpu")  # [batch, T]
        answer = torch.arange(ids.shape[1]) >= torch.tensor(cut)[:, None] + 7  # what follows "="
        labels = ids.where(answer & mask, -100)
        model(ids, attention_mask=mask.long(), labels=labels).loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


# ---- 11. Several processes (torchrun); one process is a group of one -----------------------------

def join_processes():
    """torchrun's processes, one a GPU, or several on the CPU; without torchrun a group of this one
    alone, so that nothing below asks how many there are. The first one prints. Joins once."""
    if dist.is_initialized():
        return
    alone = {} if "LOCAL_RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(**alone)  # gloo for the CPU, nccl for GPUs
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


def shard(model, config):
    """FSDP2: float32 master weights, gradients and moments, of which each process holds its part;
    compute and KV cache in bfloat16. The weights that compute stay whole between optimiser steps:
    no process waits for another while it samples. One CPU process in float32 goes without."""
    cuda = model.device.type == "cuda"
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and cuda)
    if not (cuda or half or dist.get_world_size() > 1):
        return
    # cuDNN attention: NaN gradients on H100/H200, masked and 64 modulo 128 long (pytorch 196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else torch.float32, torch.float32)
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])]
    for module in blocks + [model]:
        fully_shard(module, mp_policy=policy, reshard_after_forward=False)
        module.set_reshard_after_backward(False)
        module.set_gradient_divide_factor(1)  # a sum: a weight is a row's part in the whole batch
        module.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device))  # makes model the root
    each_shard(model, "reshard")


def each_shard(model, do):
    """unshard: makes the weights that compute, if a step outdated them; reshard: frees them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            getattr(module, do)()


def spread(work, *columns):
    """work(*columns), the rows dealt out: each process takes every W-th, all get all results."""
    world = dist.get_world_size()
    parts = [None] * world
    mine = [column[dist.get_rank()::world] for column in columns]
    dist.all_gather_object(parts, work(*mine))
    return [parts[i % world][i // world] for i in range(len(columns[0]))]


def my_passes(passes):
    """This process's passes, each with 1.0. All make as many: some repeat the first, with 0.0."""
    world = dist.get_world_size()
    total = world * math.ceil(len(passes) / world)
    for i in tqdm(range(dist.get_rank(), total, world), "updating", **BAR):
        yield (passes[i], 1.0) if i < len(passes) else (passes[0], 0.0)


# ---- 12. The run: log, checkpoint, loop, command line --------------------------------------------

def begin(model, tokenizer, config, step):
    """Random numbers that depend on seed and step alone, so that a resumed run needs no others:
    NumPy's, the same in all processes, and torch's, others in each. Returns (rng, sample, log);
    sample(prompts, n, limits) -> [P][n] Samples is `generate`, dealt out to the processes."""
    join_processes()
    rng = np.random.default_rng([config.seed, step])
    torch.manual_seed(int(rng.integers(2**62)) + dist.get_rank())
    log = dict(step=step, start=time.perf_counter(), tokens=0)

    def sample(prompts, n, limits=config.max_new_tokens):
        def work(prompts, limits):
            return generate(model, tokenizer, prompts, n, limits, config.temperature)
        each_shard(model, "unshard")
        groups = spread(work, prompts, np.broadcast_to(limits, len(prompts)))
        log["tokens"] += sum(len(s.tokens) for group in groups for s in group)
        return groups
    return rng, sample, log


RULES = """lr > 0; tau > 0; init_length > 0; max_grad_norm > 0; explore_eps > 0; eval_samples > 0
    max_new_tokens > 0; max_prompt_tokens > 0; prompts_per_step > 0; minibatches > 0
    prompts_per_step % minibatches == 0; group_size >= 2; clip_low < 1; rho_min <= rho_max <= 1
    0 < split_low <= split_high <= 1; temperature > 0 or steps == 0
    algo == 'skpo' or ablation == 'none'; out or not resume  # --resume needs --out, a run's folder
    model[:1] not in ('.', '/', '~') or Path(model).is_dir()  # there is no such folder
    model != 'embedded' or data == eval_data == ''  # --data and --eval_data need a --model"""


def check_config(config):
    """Raises UserError for flags that make no sense. What is evaluated is RULES, never input."""
    for name, value in vars(config).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: wanted is a number from 0 up")
    for rule in re.split(r"\s*[;\n]\s*", RULES):
        if not eval(rule, {"Path": Path}, vars(config)):
            raise UserError(f"wrong flags: wanted is {rule}")
    for path in [config.data, *config.eval_data.split(",")]:  # before minutes go by for the model
        if path not in ("", "sums", "arithmetic") and not Path(path).is_file():
            raise UserError(f"there is no file {path}")


def load_data(config, model, tokenizer):
    """Problems to train on, and {name: problems} to evaluate on, with their prompts' ids. Without
    --eval_data an eighth is held out, whatever the flags: a run may be resumed with others."""
    c = config
    train = load_problems(c.data or ("sums" if c.model == "embedded" else "arithmetic"))
    tests = {name: load_problems(name) for name in c.eval_data.split(",") if name}
    if not tests:
        order = np.random.default_rng(0).permutation(len(train))
        held = max(1, min(256, len(train) // 8))
        tests["held-out"] = [train[i] for i in order[:held]]
        train = [train[i] for i in sorted(order[held:])]
    limit = c.eval_problems or None
    tests = {name: test[:limit] for name, test in tests.items()}
    room = getattr(model.config, "max_position_embeddings", math.inf) - c.max_new_tokens
    if c.algo == "skpo" and c.steps:  # for a segment ahead of the prompt
        longest = max(c.init_length, c.max_new_tokens)
        room -= min(c.max_new_tokens, math.ceil(c.split_high * longest))
    room = min(room, c.max_prompt_tokens)
    for name, problems in [("--data", train), *tests.items()]:
        for p in problems:
            p.ids = prompt_ids(tokenizer, p.question, c.template)
        kept = [p for p in problems if 0 < len(p.ids) <= room]
        if len(kept) < len(problems):
            print(f"{name}: dropped {len(problems) - len(kept)} of {len(problems)} problems: "
                  f"--max_prompt_tokens and the model's context leave {room} tokens for a prompt")
        wanted = c.prompts_per_step if problems is train and c.steps else 1
        if len(kept) < wanted:
            raise UserError(f"{name}: {len(kept)} problems are too few: lower --prompts_per_step, "
                            "or --max_new_tokens, which leaves more of the context to a prompt")
        problems[:] = kept
    return train, tests


WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(out, model, optimizer, state):
    """All that a run needs to go on, in one file that takes its name by a rename: a kill leaves the
    old one or the new. The log's length comes along: what follows it is cut off on resume."""
    weights, moments = sharded.get_state_dict(model, optimizer, options=WHOLE)
    if dist.get_rank() == 0:
        trackers = [(t.value.tolist(), t.count.tolist()) for t in (state.values, state.lengths)]
        last = {i: (s.tokens, s.logprobs, False, s.prompt) for i, s in state.last.items()}
        size = (out / "metrics.jsonl").stat().st_size
        try:
            torch.save((weights, moments, trackers, last, state.step, size), out / "checkpoint.tmp")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as the second
            raise UserError(f"no checkpoint saved, the one before is untouched: {error}") from None
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")


def load_checkpoint(out, model, optimizer, state):
    """Puts model, optimizer, state and the log back where save_checkpoint saw them."""
    try:
        saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        weights, moments, trackers, last, state.step, size = saved
        for tracker, (value, count) in zip((state.values, state.lengths), trackers):
            if len(value) != len(tracker.value):
                raise ValueError(f"it knows {len(value)} problems, --data has {len(tracker.value)}")
            tracker.value[:] = value
            tracker.count[:] = count
        sharded.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments,
                               options=WHOLE)
        state.last = {i: Sample(*s) for i, s in last.items()}
    except Exception as error:  # whatever a file may hold
        raise UserError(f"cannot resume from {out}: {error}") from None
    os.truncate(out / "metrics.jsonl", size)


def set_up(config):
    """(folder, what a training step takes but config, evaluation sets), new or resumed."""
    c = config
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{c.algo}-{Path(c.model).name}-{c.seed}"
    out = Path(c.out or f"runs/{name}")
    if c.resume and not (out / "checkpoint.pt").is_file():
        raise UserError(f"--resume: there is no checkpoint in {out}")
    if not c.resume and (out / "metrics.jsonl").exists():
        raise UserError(f"{out} holds a run: choose another --out, or go on with it by --resume")
    model, tokenizer = load_model(c)
    problems, tests = load_data(c, model, tokenizer)
    shard(model, c)
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, (0.9, 0.999), fused=True)
    trackers = [Tracker(len(problems), x, c.rho_min, c.rho_max, c.tau) for x in (0, c.init_length)]
    state = State(*trackers, {})
    if c.resume:
        load_checkpoint(out, model, optimizer, state)
    optimizer.param_groups[0]["weight_decay"] = c.weight_decay  # a flag may change it on resume
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        if c.steps:  # evaluation alone leaves a run's settings as they are
            (out / "config.json").write_text(json.dumps(asdict(c), indent=1))
    sizes = ", ".join(f"{name} {len(test)}" for name, test in tests.items())
    print(f"model     {c.model}, {model.num_parameters() / 1e6:.2f}M parameters, "
          f"{dist.get_world_size()} x {model.device}\nproblems  {len(problems)}; to evaluate on: "
          f"{sizes}\nplan      {c.algo}, ablation {c.ablation}, steps {state.step + 1} to {c.steps}"
          f": {c.prompts_per_step} prompts x {c.group_size} responses of up to {c.max_new_tokens} "
          f"tokens\nfolder    {out}")
    return out, (model, tokenizer, optimizer, problems, state), tests


def train(config):
    """Evaluates, trains config.steps steps, evaluates again. Returns the run's folder."""
    c = config
    check_config(c)
    join_processes()
    if c.model == "embedded":
        torch.set_num_threads(1)  # so small a model only has threads wait for one another
    out, run, tests = set_up(c)
    model, tokenizer, optimizer, _, state = run
    start = {}  # accuracy of each evaluation set at the first evaluation

    def log(row, line):
        tqdm.write(line.format(**row))
        if dist.get_rank() == 0:
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def evaluate_all():
        for name, test in tests.items():
            row = dict(step=state.step, data=name, **evaluate(model, tokenizer, test, c))
            log(row, "step {step:4d}  accuracy on {data}: {accuracy:.3f} (avg@{samples})  "
                "{pass_at_k:.3f} (pass@{samples})  {majority:.3f} (maj@{samples})")
            if row["accuracy"] < start.setdefault(name, row["accuracy"]):
                tqdm.write(f"{' ' * 11}lower than {start[name]:.3f}: try --w_up 0, or a lower --lr")

    if not c.steps or c.eval_every and not state.step:
        evaluate_all()
    while state.step < c.steps:
        state.step += 1
        if c.algo == "grpo":
            row = grpo_step(*run, c)
        else:
            row = training_step(*run, c, **ablation(c, state.step))
        left = row["seconds"] * (c.steps - state.step) / 60
        log(row, "step {step:4d}  reward {reward:+.3f}  accuracy {accuracy:.3f}  response "
            "{response_tokens:.1f}  zero-advantage {zero_advantage:.2f}  {seconds:.1f} s, "
            f"{left:.0f} min to go")
        last = state.step == c.steps
        if c.eval_every and (last or state.step % c.eval_every == 0):
            evaluate_all()
        if c.save_every and (last or state.step % c.save_every == 0):
            save_checkpoint(out, model, optimizer, state)
    if c.steps:
        weights = sharded.get_model_state_dict(model, options=WHOLE)
        if dist.get_rank() == 0:
            model.save_pretrained(out / "model", state_dict=weights)
            tokenizer.save_pretrained(out / "model")
    return out


def parse_config(argv):
    """The command line as a Config. A comment in Config is the flag's help; the embedded model, a
    machine without a GPU and a run that is resumed bring defaults of their own."""
    for name, text in re.findall(r"    (\w+): .*?  # (.*)", inspect.getsource(Config)):
        Config.__dataclass_fields__[name].metadata = {"help": text.replace("%", "%%")}
    parser = transformers.HfArgumentParser(
        Config, usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    first = parser.parse_args(argv)
    saved = Path(first.out, "config.json")
    if first.resume and first.out and saved.is_file():
        parser.set_defaults(**json.loads(saved.read_text()))
    elif first.model == "embedded":
        parser.set_defaults(**EMBEDDED)
    elif not torch.cuda.is_available():
        parser.set_defaults(**SMALL)
        paper = " ".join(f"--{name} {getattr(Config, name)}" for name in SMALL)
        print(f"no GPU: a small plan, for what no flag sets; the paper's: {paper}")
    return Config(**vars(parser.parse_args(argv)))


def main(argv=None):
    """Runs; a mistake of the user's ends in one line and an exit code that is not 0."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        train(parse_config(argv))
        dist.destroy_process_group()
    except (UserError, OSError, SafetensorError, json.JSONDecodeError) as error:
        sys.exit(textwrap.shorten(f"skpo.py: {error}", 400))
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("skpo.py: out of memory: lower --micro_tokens, --group_size or --max_new_tokens")
    except KeyboardInterrupt:
        sys.exit("skpo.py: interrupted; --resume --out FOLDER goes on from the last checkpoint")


if __name__ == "__main__":
    main()
