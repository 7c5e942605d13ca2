# SPDX-License-Identifier: MIT
"""Tests of skpo.py against independent arithmetic and plain forward passes, in the paper's order.
Small models, on a CPU."""
import copy
import gc
import gzip
import importlib.util
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # threads would wait for one another
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedTokenizerFast

import skpo
from skpo import Config, Problem, Row, Sample, Tracker

HERE = Path(__file__).parent

@pytest.fixture(scope="session", autouse=True)
def tiny():
    """A random model of two layers in float32, and the embedded task's tokenizer."""
    skpo.join_processes()
    return skpo.embedded_model(0, steps=0)

@pytest.fixture(scope="session")
def warm():
    """The embedded model after its supervised warm-up."""
    return skpo.embedded_model(0)

@pytest.fixture(scope="session")
def folder(warm, tmp_path_factory):
    """The same as a transformers folder."""
    path = tmp_path_factory.mktemp("model")
    for part in warm:
        part.save_pretrained(path)
    return path

@pytest.fixture
def quick(warm, monkeypatch):
    """Runs of the embedded model in this process take the one that is warm already."""
    def embedded_model(*arguments, **settings):
        return copy.deepcopy(warm[0]), warm[1]
    monkeypatch.setattr(skpo, "embedded_model", embedded_model)

def config(**settings):
    return Config(**{**skpo.EMBEDDED, **settings})

def plain_logprobs(model, prompt, response, temperature=1.0):
    """By one uncached, unpadded pass: log pi of all tokens [T, V], and of the response's [T]."""
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1:-1]
    table = (logits / temperature).log_softmax(-1)
    return table, table[torch.arange(len(response)), response]

def near(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm() + 1e-6

def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def metrics_of(out, key):
    """The rows of a run's metrics.jsonl that have the key, without what is timed."""
    rows = []
    for row in read_lines(Path(out) / "metrics.jsonl"):
        if key in row:
            rows.append({name: x for name, x in row.items() if "seconds" not in name})
    return rows

def refusal(function, *arguments):
    """The line that a user reads who made a mistake."""
    with pytest.raises(skpo.UserError) as caught:
        function(*arguments)
    return str(caught.value)

# ---- 1. Config
def test_defaults_are_the_papers():
    papers = dict(
        lr=1e-6, warmup_steps=10, weight_decay=0.1, max_grad_norm=1, steps=500,
        prompts_per_step=128, minibatches=4, group_size=8, tau=8,
        max_prompt_tokens=1024, max_new_tokens=3072, init_length=1024,
        temperature=1, clip_low=0.2, clip_high=0.28, w_up=0.5, w_down=0.5,
        split_low=1 / 6, split_high=1 / 2, rho_min=0.875, rho_max=0.96, explore_eps=0.05,
    )
    assert replace(Config(), **papers) == Config()

@pytest.mark.parametrize("gpu", [True, False])
def test_the_small_plan_is_for_what_no_flag_sets(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    plan = {} if gpu else skpo.SMALL
    expected = Config(**{**plan, "model": "x", "lr": 5.0})
    assert skpo.parse_config(["--model=x", "--lr=5"]) == expected

def test_the_embedded_model_has_a_plan_of_its_own():
    assert skpo.parse_config([]) == config()

def test_no_plan_changes_the_algorithm():
    algorithm = {"algo", "ablation", "w_up", "w_down", "clip_low", "clip_high", "tau", "template"}
    assert not algorithm & {*skpo.SMALL, *skpo.EMBEDDED}

def test_a_run_without_a_gpu_says_what_it_starts_from(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    skpo.parse_config(["--model=x", "--steps=7"])
    shown = capsys.readouterr().out
    assert "7 steps, each of 8 prompts x 4 responses of up to 128 tokens" in shown
    assert "0.1 or 0 is safer" in shown
    assert max(len(line) for line in shown.splitlines()) <= 110

def test_the_comments_in_config_are_the_help(capsys):
    with pytest.raises(SystemExit):
        skpo.main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("Trains a language model to reason by SKPO")
    shown = "".join(shown.split("options:")[1].split())
    source = (HERE / "skpo.py").read_text()
    for name in vars(Config()):
        comment = re.search(rf"\n    {name}: [^#]*  # (.*)", source)[1].replace(" ", "")
        assert re.search(rf"--{name}.{{,200}}{re.escape(comment)}", shown), name

def test_the_scripts_own_dependencies_are_the_requirements():
    source = (HERE / "skpo.py").read_text()
    inline = re.search(r"\n# dependencies = (\[.*\])", source)[1]
    required = (HERE / "requirements.txt").read_text().split()
    assert sorted(json.loads(inline) + ["pytest"]) == sorted(required)

# ---- 2. Upstream
def test_the_split_is_uniform_between_a_sixth_and_a_half():
    t = np.array([skpo.split_position(600, random) for _ in range(4000)])
    assert t.min() >= 100 and t.max() <= 300
    assert abs(t.mean() - 200) < 5
    assert abs(t.std() - 200 / math.sqrt(12)) < 4

def test_a_segment_has_one_token_at_least():
    assert skpo.split_position(0.5, np.random.default_rng(0)) == 1

@pytest.mark.parametrize("length, half", [(9, 4), (8, 3), (3, 1), (2, 1), (1, 1)])
def test_an_early_segment_is_cut_to_half_without_its_eos(length, half):
    tokens = list(range(length))
    logprobs = [-0.1 * i for i in tokens]
    ended = Sample(tokens, logprobs, True, [7])
    assert skpo.cut_segment(ended) == Sample(tokens[:half], logprobs[:half], False, [7])

def test_a_paused_segment_stays_whole():
    paused = Sample([1, 2, 3], [-1.0, -2.0, -3.0], False, [7])
    assert skpo.cut_segment(paused) == paused

def logprobs_of_surprise(d):
    """Lists of different lengths, so that the sum is not the mean, with mean surprise d."""
    return [[0.1 - x, -0.1 - x] * (i + 1) for i, x in enumerate(d)]

@pytest.mark.parametrize("d, kept", [([5, 1, 3], 2), ([9, 4, 1, 2], 1), ([2, 2, 2], 0)])
def test_the_segment_of_median_surprise_is_kept_first_on_a_tie(d, kept):
    assert skpo.select_segment(logprobs_of_surprise(d)) == kept

def test_of_eight_segments_the_first_of_the_middle_two_is_kept():
    for seed in range(50):
        d = np.random.default_rng(seed).normal(size=8).tolist()
        middle = sorted(d)[3:5]
        expected = min(d.index(x) for x in middle)
        assert skpo.select_segment(logprobs_of_surprise(d)) == expected

@pytest.mark.parametrize("bos, expected", [
    (None, [7, 8, 2, 1, 3]),
    (2, [2, 7, 8, 1, 3]),  # BOS opens q, whoever wrote it
    (1, [7, 8, 2, 1, 3]),  # it does not open q
    (9, [7, 8, 2, 1, 3]),  # q has none
])
def test_the_skip_prompt_is_the_segment_then_the_prompt(bos, expected):
    assert skpo.skip_prompt([7, 8], [2, 1, 3], bos) == expected

def test_a_bos_that_opens_every_turn_stays_where_it_is():
    assert skpo.skip_prompt([7, 8], [1, 5, 1, 6], 1) == [7, 8, 1, 5, 1, 6]

# ---- 3. Values and trackers
@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_the_value_of_a_segment_is_the_mean_reward(kind):
    rewards = kind([[1, -1, -1, -1], [1, 1, 1, 1], [-1, -1, -1, -1]])
    assert skpo.monte_carlo_value(rewards).tolist() == [-0.5, 1, -1]

def test_the_tracker_follows_spo():
    tracker = Tracker(3, 0.5)
    x, N = 0.5, 0.0  # rho N is 0: the first observation replaces the initial value
    for D, rho in ((0, 0.96), (0, 0.96), (100, 0.875), (1, 2 ** (-1 / 8))):
        observation = 0.3 - N
        tracker.update([0, 1], [0.1, observation], [0.0, D])
        x = x + (observation - x) / (rho * N + 1)
        N = rho * N + 1
        assert np.isclose(tracker.value[1], x)
        assert np.isclose(tracker.count[1], N)
    assert np.isclose(tracker.value[0], 0.1)
    assert (tracker.value[2], tracker.count[2]) == (0.5, 0)  # not seen

def test_prompts_of_middling_value_are_chosen_most():
    values = np.array([-1.0, 0.0, 1.0, 0.6])
    rng = np.random.default_rng(0)
    picks = np.ravel([skpo.choose_prompts(values, 1, rng) for _ in range(8000)])
    weight = np.array([0, 0.5, 0, 0.4]) + 0.05  # v of 0.6 is 0.8: sqrt(0.8 * 0.2) = 0.4
    share = np.bincount(picks, minlength=4) / 8000
    assert np.allclose(share, weight / weight.sum(), atol=0.02)

def test_chosen_prompts_are_distinct():
    rng = np.random.default_rng(0)
    assert sorted(skpo.choose_prompts(np.zeros(4), 4, rng)) == [0, 1, 2, 3]

# ---- 4. Advantages and losses
@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_group_advantages(kind):
    rewards = kind([[1, -1, -1, -1], [1, 1, 1, 1], [-1, -1, -1, -1]])
    expected = np.array([[1.5, -0.5, -0.5, -0.5], [0] * 4, [0] * 4]) / math.sqrt(0.75)
    assert np.allclose(skpo.group_advantages(rewards), expected)

def test_equal_rewards_have_no_advantage_whatever_rounding_leaves():
    assert not skpo.group_advantages([[0.1] * 7]).any()

def test_upstream_advantages():
    A = skpo.upstream_advantages([1.0, 0.0, -0.5], [0.5, 0.5, 0.0])  # raw: 0.5, -0.5, -0.5
    assert np.allclose(A, np.array([2, -1, -1]) / math.sqrt(2))
    assert not skpo.upstream_advantages([0.3, 0.3], [0.2, 0.2]).any()

def loop_over_tokens(name, high, logprobs, old, A, weights):
    """A loss and its gradient [N, T], token by token; and how many tokens are beyond the clip."""
    loss = 0.0
    gradient = np.zeros_like(logprobs)
    beyond = dict(low=0, high=0, low_stopped=0, high_stopped=0)
    for i, t in np.argwhere(weights):
        a, w = A[i], weights[i, t]
        r = math.exp(logprobs[i, t] - old[i, t])
        clipped = min(max(r, 0.8), high)
        beyond["low"] += r < 0.8
        beyond["high"] += r > high
        beyond["low_stopped"] += r < 0.8 and a < 0
        beyond["high_stopped"] += r > high and a > 0
        if name == "downstream_loss":  # a clipped token keeps its gradient
            loss -= w * clipped * a * logprobs[i, t]
            gradient[i, t] = -w * clipped * a
        else:  # a token clipped in its advantage's direction loses it
            loss -= w * min(r * a, clipped * a)
            gradient[i, t] = 0 if r * a > clipped * a else -w * r * a
    return loss, gradient, beyond

@pytest.mark.parametrize("name, high", [("downstream_loss", 1.28), ("upstream_loss", 1.2)])
def test_losses_and_gradients_are_a_loops(name, high):
    rng = np.random.default_rng(0)
    old = -rng.random((6, 9))
    A = rng.normal(size=6)
    weights = rng.random((6, 9)) + 0.1
    weights[:2, 5:] = 0  # padding
    logprobs = old + 0.6 * rng.normal(size=(6, 9))
    expected, gradient, beyond = loop_over_tokens(name, high, logprobs, old, A, weights)
    assert min(beyond.values()) >= 3  # so that every case counts
    now = torch.tensor(logprobs, requires_grad=True)
    loss_function = getattr(skpo, name)  # its default clips are the paper's
    loss = loss_function(now, torch.tensor(old), torch.tensor(A), torch.tensor(weights))
    loss.backward()
    assert np.isclose(loss.item(), expected)
    assert near(now.grad, torch.tensor(gradient))

# ---- 5. Collect
def collect_once(warm, step=1, seen=False, reward=skpo.math_reward, **settings):
    """A step of 4 of 8 problems, with all that it sampled: its calls of `generate`, in order."""
    c = config(prompts_per_step=4, minibatches=2, **settings)
    model, tokenizer = copy.deepcopy(warm[0]), warm[1]
    problems = skpo.load_problems("sums")[:8]
    for problem in problems:
        problem.ids = skpo.prompt_ids(tokenizer, problem.question)
    state = skpo.initial_state(8, c)
    state.step = step
    if seen:  # each problem once, by a policy far away
        state.values.value[:] = np.linspace(-0.5, 0.5, 8)
        state.values.count[:] = 1
        for i, problem in enumerate(problems):
            state.kept[i] = Sample([1], [-99.0], False, problem.ids)
    t = SimpleNamespace(config=c, model=model, tokenizer=tokenizer, state=state, calls=[])
    t.V = state.values.value.copy()
    generate = skpo.generate

    def spy(model, tokenizer, prompts, n, limits, temperature):
        groups = generate(model, tokenizer, prompts, n, limits, temperature)
        t.calls.append(SimpleNamespace(prompts=prompts, n=n, limits=limits, groups=groups))
        return groups

    collect = skpo.collect_grpo if c.algo == "grpo" else skpo.collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skpo, "generate", spy)
        t.rows, t.rollouts, t.metrics = collect(model, tokenizer, problems, state, c, reward)
    ids = [problem.ids for problem in problems]
    t.q = t.calls[0].prompts  # [B]
    t.chosen = [ids.index(q) for q in t.q]  # [B]
    t.answers = [problems[i].answer for i in t.chosen]  # [B]
    t.up = [group[0] for group in t.rows]  # [B]
    t.down = [group[1:] for group in t.rows]  # [B][G]
    t.segments = [row.sample.tokens for row in t.up]  # [B]
    return t

def outcomes(t, groups):
    """+1 or -1 for [B][n] lists of ids, read off the characters: [B, n]."""
    rewards = np.zeros((len(groups), len(groups[0])))
    for b, group in enumerate(groups):
        for i, ids in enumerate(group):
            text = t.tokenizer.decode(ids, skip_special_tokens=True)
            right = text.endswith("\\boxed{" + t.answers[b] + "}")
            rewards[b, i] = 1 if right else -1
    return rewards

def tokens_of(groups):
    """[B][n] Samples -> [B][n] lists of ids."""
    return [[sample.tokens for sample in group] for group in groups]

def standard(x):
    """Normalised over the last axis, 0 where all are equal."""
    std = x.std(-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / np.where(std, std, 1)

@pytest.fixture(scope="session")
def step(warm):
    return collect_once(warm, seen=True)

def test_step_1_chooses_distinct_prompts(step):
    assert len(set(step.chosen)) == step.config.prompts_per_step == 4

def test_step_2_draws_g_segments_from_q_paused_between_a_sixth_and_a_half(step):
    first = step.calls[0]
    assert first.n == 8
    assert 2 <= min(first.limits) <= max(first.limits) <= 5  # L_q is 10

def test_step_2_pauses_within_the_response_limit(warm):
    t = collect_once(warm, init_length=1000)
    assert t.calls[0].limits == [24] * 4

def test_step_3_keeps_the_segment_of_median_surprise_cut_if_it_ended(step):
    for kept, group in zip(step.segments, step.calls[0].groups):
        cut = [skpo.cut_segment(segment) for segment in group]
        d = [-np.mean(segment.logprobs) for segment in cut]
        gaps = [round(abs(x - np.median(d)), 9) for x in d]
        assert kept == cut[gaps.index(min(gaps))].tokens

def test_steps_4_and_5_sample_g_complete_responses_from_segment_then_prompt(step):
    second = step.calls[1]
    assert second.prompts == [s + q for s, q in zip(step.segments, step.q)]
    assert second.n == 8
    assert second.limits == [24] * 4

def test_step_6_values_a_segment_by_the_mean_reward_of_its_responses(step):
    R = outcomes(step, tokens_of(step.calls[1].groups))
    assert [rollout["value"] for rollout in step.rollouts] == R.mean(1).tolist()
    assert 0 < (R > 0).mean() < 1  # so that the next tests say something

def test_step_7_advantages_within_the_group(step):
    R = outcomes(step, tokens_of(step.calls[1].groups))
    A = [[row.advantage for row in group] for group in step.down]
    assert np.allclose(A, standard(R))

def test_step_8_upstream_advantage_takes_v_from_before_the_step(step):
    R = outcomes(step, tokens_of(step.calls[1].groups))
    A = [row.advantage for row in step.up]
    assert np.allclose(A, standard(R.mean(1) - step.V[step.chosen]))

def test_step_9_rows_are_the_segment_then_its_responses(step):
    for b, group in enumerate(step.rows):
        assert group[0].sample.prompt == step.q[b]
        assert group[0].ppo_clip
        assert [row.sample for row in group[1:]] == step.calls[1].groups[b]
        assert not any(row.ppo_clip for row in group[1:])

def test_step_9_weights_are_means_over_tokens_then_over_prompts(warm):
    t = collect_once(warm, w_up=0.3, w_down=0.6)
    for up, down in zip(t.up, t.down):
        assert np.isclose(up.weight * len(up.sample.tokens), 0.3 / 2)  # 2 prompts a mini-batch
        tokens = sum(len(row.sample.tokens) for row in down)
        assert np.allclose([row.weight * tokens for row in down], 0.6 / 2)

def test_step_11_moves_the_trackers_and_keeps_the_segments(step):
    R = outcomes(step, tokens_of(step.calls[1].groups))
    for b, i in enumerate(step.chosen):
        error = R[b].mean() - step.V[i]
        expected = step.V[i] + error / 1.875  # seen once, and pi moved far: rho is 0.875
        assert np.isclose(step.state.values.value[i], expected)
        lengths = [len(o.tokens) for o in step.calls[1].groups[b]]
        assert np.isclose(step.state.lengths.value[i], np.mean(lengths))
        assert step.state.kept[i] == step.up[b].sample

def test_the_drift_is_how_far_logprobs_of_the_kept_segment_moved(tiny):
    segments = []
    for prompt, tokens in (([1, 2], [3, 4]), ([5], [6]), ([1, 2], [7, 8, 9])):
        segments.append(Sample(tokens, [-1.0] * len(tokens), False, prompt))
    D = skpo.policy_drift(tiny[0], segments, config(temperature=0.7))
    for drift, s in zip(D, segments):
        _, now = plain_logprobs(tiny[0], s.prompt, s.tokens, 0.7)
        assert np.isclose(drift, (now + 1).abs().mean().item(), rtol=1e-4)

def test_collect_moves_no_weight_and_leaves_no_gradient(step, warm):
    assert all(map(torch.equal, step.model.parameters(), warm[0].parameters()))
    assert all(p.grad is None for p in step.model.parameters())

def test_metrics_of_a_step(step):
    groups = step.calls[1].groups
    samples = sum(groups, [])
    R = outcomes(step, tokens_of(groups))
    drawn = sum(step.calls[0].groups, []) + samples
    expected = dict(
        reward=R.mean(),
        mc_value=R.mean(),
        zero_advantage=np.mean(R.std(1) == 0),
        response_tokens=np.mean([len(o.tokens) for o in samples]),
        segment_tokens=np.mean([len(s) for s in step.segments]),
        truncated=np.mean([not o.finished for o in samples]),
        entropy=-np.mean(sum([o.logprobs for o in samples], [])),
        tokens=sum(len(s.tokens) for s in drawn),
    )
    assert step.metrics == pytest.approx(expected)

def test_rollouts_hold_texts_rewards_and_advantages(step):
    R = outcomes(step, tokens_of(step.calls[1].groups))
    for b, rollout in enumerate(step.rollouts):
        assert rollout["problem"] == step.chosen[b]
        assert rollout["prompt"] == step.tokenizer.decode(step.q[b])
        assert rollout["segment"] == step.tokenizer.decode(step.segments[b])
        assert rollout["advantage"] == step.up[b].advantage
        for i, response in enumerate(rollout["responses"]):
            o = step.calls[1].groups[b][i]
            assert response["text"] == step.tokenizer.decode(o.tokens, skip_special_tokens=True)
            assert response["reward"] == R[b, i]
            assert response["advantage"] == step.down[b][i].advantage
            assert response["truncated"] is not o.finished
    json.dumps(step.rollouts)

def test_a_step_is_the_same_for_the_same_seed_and_step(warm):
    again = collect_once(warm, seen=True)
    other = collect_once(warm, seen=True, step=2)
    assert again.rows == collect_once(warm, seen=True).rows != other.rows

# -- Table 2, and the baseline
def test_no_skip_goes_on_after_the_segment(warm):
    t = collect_once(warm, ablation="no_skip")
    second = t.calls[1]
    assert second.prompts == [q + s for q, s in zip(t.q, t.segments)]
    assert second.limits == [24 - len(s) for s in t.segments]

def test_no_skip_grades_and_measures_the_segment_too(warm):
    t = collect_once(warm, ablation="no_skip")
    whole = []
    for s, group in zip(t.segments, t.calls[1].groups):
        whole.append([s + o.tokens for o in group])
    assert np.isclose(t.metrics["reward"], outcomes(t, whole).mean())
    lengths = np.array([[len(ids) for ids in group] for group in whole])
    assert np.allclose(t.state.lengths.value[t.chosen], lengths.mean(1))
    for s, rollout in zip(t.segments, t.rollouts):
        assert rollout["responses"][0]["text"].startswith(t.tokenizer.decode(s))

def test_no_mc_values_a_segment_by_its_own_continuation(warm):
    t = collect_once(warm, ablation="no_mc")
    _, second, third = t.calls
    assert second.prompts == [s + q for s, q in zip(t.segments, t.q)]
    assert third.prompts == [q + s for q, s in zip(t.q, t.segments)]
    assert third.n == 1
    whole = [[s + group[0].tokens] for s, group in zip(t.segments, third.groups)]
    R = outcomes(t, whole)[:, 0]
    assert np.allclose([row.advantage for row in t.up], standard(R))
    assert np.allclose(t.state.values.value[t.chosen], R)
    sampled = 0
    for call in t.calls:
        sampled += sum(len(s.tokens) for s in sum(call.groups, []))
    assert t.metrics["tokens"] == sampled

def test_no_mc_takes_a_segment_that_ended_as_its_own_continuation(warm):
    t = collect_once(warm, ablation="no_mc", init_length=60)  # paused after 10 tokens or more
    assert t.calls[2].prompts == []
    whole = []
    for kept, group in zip(t.segments, t.calls[0].groups):
        uncut = [o.tokens for o in group if skpo.cut_segment(o).tokens == kept]
        whole.append(uncut[:1])
    R = outcomes(t, whole)[:, 0]
    assert np.allclose([row.advantage for row in t.up], standard(R))

@pytest.mark.parametrize("step, share", [(1, 1 / 2), (2, 1 / 6)])
def test_fixed_split_alternates_between_the_ends(warm, step, share):
    t = collect_once(warm, step, ablation="fixed_split", init_length=12)
    assert t.calls[0].limits == [12 * share] * 4

@pytest.mark.parametrize("step, extreme", [(1, max), (2, min)])
def test_extreme_selection_alternates_between_least_and_most_likely(warm, step, extreme):
    t = collect_once(warm, step, ablation="extreme_selection")
    for kept, group in zip(t.segments, t.calls[0].groups):
        cut = [skpo.cut_segment(segment) for segment in group]
        d = [-np.mean(segment.logprobs) for segment in cut]
        assert kept == cut[d.index(extreme(d))].tokens

@pytest.fixture(scope="session")
def grpo(warm):
    return collect_once(warm, algo="grpo", w_up=0.3)

def test_grpo_samples_g_responses_from_q_and_nothing_else(grpo):
    [call] = grpo.calls
    assert call.n == 8
    assert call.limits == [24] * 4
    samples = [[row.sample for row in group] for group in grpo.rows]
    assert samples == call.groups

def test_grpo_has_group_advantages_in_ppos_clip_whatever_w_up(grpo):
    R = outcomes(grpo, tokens_of(grpo.calls[0].groups))
    A = [[row.advantage for row in group] for group in grpo.rows]
    assert np.allclose(A, standard(R))
    for row in sum(grpo.rows, []):
        assert row.ppo_clip
        assert np.isclose(row.weight * len(row.sample.tokens), 1 / 16)  # 2 prompts of 8 responses
    assert np.allclose(grpo.state.values.value[grpo.chosen], R.mean(1))

def test_grpo_has_no_segment_in_its_rollouts(grpo):
    assert {rollout["segment"] for rollout in grpo.rollouts} == {None}
    assert "segment_tokens" not in grpo.metrics

# -- rewards of one's own
def test_a_reward_of_ones_own_sees_response_and_problem(warm):
    def length(response, problem):
        return len(response) / 1000 if problem.question else -1.0
    t = collect_once(warm, reward=length)
    for rollout in t.rollouts:
        for response in rollout["responses"]:
            assert response["reward"] == len(response["text"]) / 1000

@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1.5, -2, None, "1"])
def test_a_reward_that_is_no_number_from_minus_1_to_1_is_refused(warm, wrong):
    def reward(response, problem):
        return wrong
    with pytest.raises(skpo.UserError, match="must be a number from -1 to 1"):
        collect_once(warm, reward=reward)

# ---- 6. Learn
def mini_batch(model, tokenizer, temperature=1.0):
    """Rows as of 2 prompts: a segment and 4 responses each, with advantages of either sign."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rows = []
    prompts = [[1, 2, 3, 10], [4, 5, 10]]
    for group in skpo.generate(model, tokenizer, prompts, 4, 9, temperature):
        segment = group[1]
        rows.append(Row(segment, rng.normal(), 0.3 / len(segment.tokens), ppo_clip=True))
        tokens = sum(len(o.tokens) for o in group)
        for o in group:
            rows.append(Row(o, rng.normal(), 0.2 / tokens, ppo_clip=False))
    return rows

def moved(model):
    """A copy of a model that has moved from where it sampled, so that ratios are not 1."""
    model = copy.deepcopy(model)
    model.model.norm.weight.data *= 1.3
    return model

def plain_loss(model, rows, temperature=1.0):
    """Eq. 4 row by row; and by phase how many tokens, their ratios, the clipped ones: [2, 3]."""
    loss = 0.0
    figures = np.zeros((2, 3))
    for row in rows:
        s, A = row.sample, row.advantage
        _, logprobs = plain_logprobs(model, s.prompt, s.tokens, temperature)
        ratio = (logprobs - torch.tensor(s.logprobs)).exp()
        clipped = ratio.clamp(0.8, 1.2 if row.ppo_clip else 1.28)
        if row.ppo_clip:
            objective = torch.minimum(ratio * A, clipped * A)
        else:
            objective = clipped.detach() * A * logprobs
        loss = loss - row.weight * objective.sum()
        beyond = (ratio != clipped).sum().item()
        figures[0 if row.ppo_clip else 1] += len(ratio), ratio.sum().item(), beyond
    return loss, figures

def keep_gradients(optimizer):
    """A list that fills with the whole gradients of each step of the optimiser."""
    kept = []

    def keep(*_):
        gradients = []
        for p in optimizer.param_groups[0]["params"]:
            whole = hasattr(p.grad, "full_tensor")
            gradients.append(p.grad.full_tensor() if whole else p.grad.clone())
        kept.append(gradients)

    optimizer.register_step_pre_hook(keep)
    return kept

@pytest.mark.parametrize("micro_tokens", [1, 40, 99, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_any_micro_tokens_gives_the_plain_gradient(tiny, micro_tokens, temperature):
    rows = mini_batch(*tiny, temperature)
    model = moved(tiny[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    kept = keep_gradients(optimizer)
    c = config(micro_tokens=micro_tokens, temperature=temperature, max_grad_norm=1e9)
    norm, figures = skpo.optimizer_step(model, optimizer, rows, c)
    loss, expected_figures = plain_loss(model, rows, temperature)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(near, kept[0], expected))
    plain_norm = torch.cat([g.flatten() for g in expected]).norm().item()
    assert np.isclose(norm, plain_norm, rtol=1e-4) and norm > 0.01
    assert np.allclose(figures, expected_figures, rtol=1e-4)
    assert expected_figures.min() > 0  # some tokens of either phase are clipped

def test_a_large_gradient_is_scaled_down_to_the_norm(tiny):
    rows = mini_batch(*tiny)
    model = copy.deepcopy(tiny[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    kept = keep_gradients(optimizer)
    norm, _ = skpo.optimizer_step(model, optimizer, rows, config(max_grad_norm=0.01))
    scaled = torch.cat([g.flatten() for g in kept[0]]).norm().item()
    assert norm > 0.02
    assert np.isclose(scaled, 0.01, rtol=1e-3)

def test_learn_takes_one_step_per_mini_batch_and_cuts_between_prompts(warm):
    t = collect_once(warm)
    optimizer = torch.optim.SGD(t.model.parameters(), lr=0)
    kept = keep_gradients(optimizer)
    skpo.learn(t.model, optimizer, t.rows, config(minibatches=2, max_grad_norm=1e9))
    assert len(kept) == 2
    for gradients, groups in zip(kept, (t.rows[:2], t.rows[2:])):
        loss, _ = plain_loss(t.model, sum(groups, []))
        expected = torch.autograd.grad(loss, list(t.model.parameters()))
        assert all(map(near, gradients, expected))

def test_the_first_mini_batch_is_on_policy_and_the_last_is_not(warm):
    t = collect_once(warm)
    optimizer = torch.optim.AdamW(t.model.parameters(), lr=1e-2)
    c = config(minibatches=2)
    _, first = skpo.optimizer_step(t.model, optimizer, sum(t.rows[:2], []), c)
    _, last = skpo.optimizer_step(t.model, optimizer, sum(t.rows[2:], []), c)
    assert np.allclose(first[:, 1] / first[:, 0], 1, atol=1e-5)
    assert not first[:, 2].any()
    assert last[:, 2].any()

def test_metrics_of_learn_are_per_phase(tiny):
    rows = mini_batch(*tiny)
    model = moved(tiny[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    metrics = skpo.learn(model, optimizer, [rows[:5], rows[5:]], config(minibatches=1))
    _, figures = plain_loss(model, rows)
    for phase, (tokens, ratios, clipped) in zip(("up", "down"), figures):
        assert np.isclose(metrics[f"ratio_{phase}"], ratios / tokens, rtol=1e-4)
        assert np.isclose(metrics[f"clip_{phase}"], clipped / tokens, rtol=1e-4)

def test_a_phase_that_trained_nothing_has_no_figures(tiny):
    rows = [row for row in mini_batch(*tiny) if not row.ppo_clip]
    model = copy.deepcopy(tiny[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    metrics = skpo.learn(model, optimizer, [rows], config(minibatches=1))
    assert metrics["ratio_up"] is None and metrics["clip_up"] is None
    assert metrics["clip_down"] == 0

@pytest.mark.parametrize("nothing", [dict(advantage=0.0), dict(weight=0.0)])
def test_what_has_no_advantage_or_no_weight_moves_nothing(tiny, nothing):
    rows = [replace(row, **nothing) for row in mini_batch(*tiny)]
    model = copy.deepcopy(tiny[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norm, figures = skpo.optimizer_step(model, optimizer, rows, config())
    assert norm == 0 and not figures.any()
    assert all(map(torch.equal, model.parameters(), tiny[0].parameters()))

def test_a_gradient_that_is_not_finite_is_refused_and_moves_nothing(tiny):
    rows = [replace(row, advantage=math.inf) for row in mini_batch(*tiny)]
    model = copy.deepcopy(tiny[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert "not a finite number" in refusal(skpo.optimizer_step, model, optimizer, rows, config())
    assert all(map(torch.equal, model.parameters(), tiny[0].parameters()))

def test_micro_batches_cover_every_row_once_within_the_limit():
    lengths = np.random.default_rng(0).integers(1, 200, 64).tolist()
    samples = []
    for i, length in enumerate(lengths):
        prompt = [i // 8] * (5 + i // 8)
        samples.append(Sample([0] * length, [], True, prompt))
    for limit in (1, 300, 1000, 10**6):
        passes = skpo.micro_batches(samples, limit)
        assert sorted(sum(passes, [])) == list(range(64))
        for indices in passes:
            prompts = {tuple(samples[i].prompt) for i in indices}
            tokens = len(indices) * max(lengths[i] for i in indices)
            tokens += len(prompts) * max(map(len, prompts))
            assert len(indices) == 1 or tokens <= limit
    assert len(passes) == 1
    assert skpo.micro_batches([], 100) == []

def test_bfloat16_computes_and_float32_is_trained(tiny):
    model = copy.deepcopy(tiny[0])
    c = config(dtype="bfloat16")
    skpo.shard(model, c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0)
    skpo.unshard(model)
    rows = mini_batch(model, tiny[1])
    _, figures = skpo.optimizer_step(model, optimizer, rows, c)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    after = [p.full_tensor() for p in optimizer.param_groups[0]["params"]]
    assert {p.dtype for p in after} == {torch.float32}
    changed = [(a != b).float().mean() for a, b in zip(after, tiny[0].parameters())]
    assert np.mean(changed) > 0.9  # a step of 1e-6 is not swallowed
    assert np.allclose(figures[:, 1] / figures[:, 0], 1, atol=0.02)

# ---- 7. Sampling
PROMPTS = [[1, 2, 3, 4, 5, 10], [7, 10], [3], [5] * 12 + [10]]

def with_hostile_config(model, eos=13):
    """A copy whose generation_config is not the policy, and whose pad is an EOS."""
    model = copy.deepcopy(model)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, temperature=0.2, repetition_penalty=3.0, max_length=9,
        no_repeat_ngram_size=2, bad_words_ids=[[1]], min_new_tokens=5, num_return_sequences=1,
        pad_token_id=13, eos_token_id=eos)
    return model

def check_samples(model, tokenizer, n, limits, eos={13}, temperature=1.0):
    """Samples after PROMPTS stand in their order, end where they should, and their log-probs are
    those of a plain forward pass."""
    torch.manual_seed(0)
    groups = skpo.generate(model, tokenizer, PROMPTS, n, limits, temperature)
    assert [len(group) for group in groups] == [n] * len(PROMPTS)
    for prompt, group, limit in zip(PROMPTS, groups, limits):
        for sample in group:
            assert sample.prompt == prompt
            assert sample.finished == (sample.tokens[-1] in eos)
            assert not eos & {*sample.tokens[:-1]}
            assert len(sample.tokens) <= limit
            assert sample.finished or len(sample.tokens) == limit
            _, expected = plain_logprobs(model, prompt, sample.tokens, temperature)
            assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_a_fresh_forward(tiny, temperature):
    model = with_hostile_config(tiny[0], eos=[13, 4])
    check_samples(model, tiny[1], 5, [40, 3, 70, 1], {13, 4}, temperature)

def test_the_models_own_generation_config_comes_back(tiny):
    model = with_hostile_config(tiny[0])
    own = model.generation_config
    skpo.generate(model, tiny[1], PROMPTS, 1, 2)
    assert model.generation_config is own
    with pytest.raises(IndexError):
        skpo.generate(model, tiny[1], [[99]], 1, 2)  # no such token
    assert model.generation_config is own

DEFERRED = getattr(transformers.generation.utils, "DeferredStopCheck", None)

@pytest.mark.skipif(DEFERRED is None, reason="this transformers stops in time")
def test_logprobs_stay_aligned_if_transformers_stops_a_step_late(tiny, monkeypatch):
    monkeypatch.setattr(DEFERRED, "is_supported", MagicMock(return_value=True))
    monkeypatch.setattr(torch, "Event", MagicMock())  # a CPU has none
    monkeypatch.setattr(skpo, "rows_that_fit", MagicMock(return_value=5))
    check_samples(*tiny, 3, [40, 3, 70, 1])
    assert DEFERRED.is_supported.called

@pytest.mark.parametrize("chunk", [1, 32])
def test_samples_come_from_the_policy(tiny, monkeypatch, chunk):
    monkeypatch.setattr(skpo, "CHUNK", chunk)
    model = with_hostile_config(tiny[0])
    torch.manual_seed(1)
    share = np.zeros((15, 15))
    for sample in skpo.generate(model, tiny[1], PROMPTS[:1], 20000, 2)[0]:
        share[sample.tokens[0], sample.tokens[-1]] += 1 / 20000  # an EOS at once: (13, 13)
    every_first = torch.tensor([PROMPTS[0] + [first] for first in range(15)])
    p = model(every_first).logits.softmax(-1).detach().numpy()  # [15, 7, V]
    truth = p[0, -2, :, None] * p[:, -1]  # [V, V]
    truth[13] = 0
    truth[13, 13] = p[0, -2, 13]
    assert np.abs(share - truth).sum() / 2 < 0.05  # total variation

def test_greedy_takes_the_likeliest_and_no_eos_means_no_end(tiny):
    model, tokenizer = copy.deepcopy(tiny)
    model.generation_config = transformers.GenerationConfig()
    tokenizer.eos_token = None
    sample = skpo.generate(model, tokenizer, PROMPTS[:1], 2, 50, temperature=0)[0][1]
    table, _ = plain_logprobs(model, PROMPTS[0], sample.tokens)
    assert table.argmax(-1).tolist() == sample.tokens
    assert len(sample.tokens) == 50
    assert not sample.finished

def test_no_prompts_give_no_samples(tiny):
    assert skpo.generate(*tiny, [], 3, []) == []

@pytest.mark.parametrize("fit", [1, 5])
def test_rows_wait_in_a_queue_where_the_memory_is_short(tiny, monkeypatch, fit):
    monkeypatch.setattr(skpo, "rows_that_fit", MagicMock(return_value=fit))
    monkeypatch.setattr(tiny[0], "generate", MagicMock(side_effect=tiny[0].generate))
    check_samples(*tiny, 3, [4, 50, 60, 7])
    sizes = [len(call.args[0]) for call in tiny[0].generate.call_args_list]
    assert max(sizes) == fit

def test_rows_that_wait_again_keep_their_tokens_and_come_last(tiny, monkeypatch):
    monkeypatch.setattr(skpo, "rows_that_fit", MagicMock(return_value=4))
    monkeypatch.setattr(skpo, "prefill", MagicMock(side_effect=skpo.prefill))
    check_samples(*tiny, 6, [90, 80, 70, 60])
    prefilled = [prompt for call in skpo.prefill.call_args_list for prompt in call.args[1]]
    again = [prompt not in PROMPTS for prompt in prefilled]
    assert sum(again) > 5
    assert again == sorted(again)

def test_the_queue_wastes_few_rows(monkeypatch):
    config = transformers.Qwen2Config(
        vocab_size=67, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False)
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.lm_head.weight.data.zero_()  # each token, the EOS too, has the probability 1 / 67
    monkeypatch.setattr(skpo, "rows_that_fit", MagicMock(return_value=32))
    counter = MagicMock(return_value=None)
    model.get_decoder().register_forward_hook(counter)
    prompts = [[i, 1] for i in range(32)]
    torch.manual_seed(0)
    groups = skpo.generate(model, MagicMock(eos_token_id=66), prompts, 8, 1000)
    lengths = [len(sample.tokens) for group in groups for sample in group]
    assert abs(np.mean(lengths) - 67) < 15
    assert counter.call_count * 32 / sum(lengths) < 2.2

def test_rows_of_all_lengths_never_make_a_turn_wider_than_prompt_and_limit(tiny, monkeypatch):
    monkeypatch.setattr(skpo, "rows_that_fit", MagicMock(return_value=3))
    widths = []
    draw = skpo.draw
    def note_width(model, ids, *rest):
        tokens, logprobs = draw(model, ids, *rest)
        widths.append(ids.shape[1] + tokens.shape[1])
        return tokens, logprobs
    monkeypatch.setattr(skpo, "draw", note_width)
    torch.manual_seed(0)
    skpo.generate(*tiny, PROMPTS, 6, 40)
    assert 40 < max(widths) <= 13 + 40  # the longest prompt has 13 tokens

def test_the_same_seed_gives_the_same_samples(tiny, monkeypatch):
    monkeypatch.setattr(skpo, "rows_that_fit", MagicMock(return_value=5))
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(skpo.generate(*tiny, PROMPTS, 4, 40))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]

def test_scores_do_not_outlive_their_token(tiny):
    alive = []
    def count_scores(*_):
        """How many float tensors of [7, V], for seven rows, live when the model is called."""
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        scores = [x for x in tensors if x.shape == (7, 15) and x.is_floating_point()]
        alive.append(len(scores))
    handle = tiny[0].get_decoder().register_forward_pre_hook(count_scores)
    skpo.generate(*tiny, PROMPTS[:1], 7, 16)
    handle.remove()
    assert len(alive) > 10
    assert max(alive) <= 2  # the last scores and their softmax, which transformers itself holds

def test_as_many_rows_fit_as_their_keys_values_and_logits_leave_room_for(tiny):
    token = 2 * 2 * 2 * 16 * 4  # keys and values, 2 layers, 2 heads of 16 numbers, float32
    logits = 4 * 15 * 4  # four copies of 15 numbers
    prefill = skpo.PREFILL * 24 * 64 * 4
    for length in (10, 3000):
        row = token * (length + skpo.CHUNK) + logits
        assert skpo.rows_that_fit(tiny[0], length) == (4e9 - prefill) // row
    assert skpo.rows_that_fit(tiny[0], 10**9) == 1


# ---- 8. Log-probs
def test_shared_prefix_logprobs_and_gradients_are_the_plain_ones(tiny):
    model = tiny[0]
    weights = list(model.parameters())
    prompts = [[1, 2, 3, 10]] * 4 + [[4, 10]] * 4 + [[5]] * 4
    responses = [[n, *range(n)][:n] for n in (5, 1, 11, 0, 2, 9, 3, 3, 7, 1, 4, 8)]
    logprobs, mask = skpo.response_logprobs(model, prompts, responses, 0.8)
    plain = [plain_logprobs(model, *row, 0.8)[1] for row in zip(prompts, responses)]
    plain = torch.cat(plain)  # [sum of lengths]
    assert mask.sum(1).tolist() == [len(response) for response in responses]
    assert near(logprobs[mask], plain)
    assert not logprobs[~mask].any()
    slopes = torch.linspace(-1, 1, len(plain))
    shared_gradients = torch.autograd.grad((logprobs[mask] * slopes).sum(), weights)
    plain_gradients = torch.autograd.grad((plain * slopes).sum(), weights)
    for shared, expected in zip(shared_gradients, plain_gradients):
        assert near(shared, expected)

def test_equal_prompts_are_run_once(tiny):
    hook = MagicMock(return_value=None)
    handle = tiny[0].get_decoder().layers[0].register_forward_hook(hook)
    skpo.prefill(tiny[0], [[1, 2, 3], [4, 2, 3], [1, 2, 3]])
    handle.remove()
    assert hook.call_args.args[2].shape[:2] == (2, 2)

@pytest.mark.parametrize("prompts", [[[5]], [[5], [5], [6]], [[5], [1, 2, 3]]])
def test_prompts_of_one_token(tiny, prompts):
    logprobs, _ = skpo.response_logprobs(tiny[0], prompts, [[1, 2]] * len(prompts))
    for row, prompt in zip(logprobs, prompts):
        assert near(row, plain_logprobs(tiny[0], prompt, [1, 2])[1])
    torch.manual_seed(0)
    for prompt, group in zip(prompts, skpo.generate(*tiny, prompts, 2, 20)):
        for sample in group:
            _, expected = plain_logprobs(tiny[0], prompt, sample.tokens)
            assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)

@pytest.mark.parametrize("tokens, calls", [(1, 12), (9, 6), (20, 3)])  # 4 rows, 12 columns
def test_a_prefill_in_pieces_gives_the_same_cache(tiny, monkeypatch, tokens, calls):
    _, mask, whole = skpo.prefill(tiny[0], PROMPTS)
    monkeypatch.setattr(skpo, "PREFILL", tokens)
    monkeypatch.setattr(skpo, "forward", MagicMock(side_effect=skpo.forward))
    _, _, pieces = skpo.prefill(tiny[0], PROMPTS)
    assert skpo.forward.call_count == calls
    seen = mask[:, :-1]  # [N, S - 1]
    for a, b in zip(whole.layers, pieces.layers):
        assert near(b.keys.transpose(1, 2)[seen], a.keys.transpose(1, 2)[seen])
        assert near(b.values.transpose(1, 2)[seen], a.values.transpose(1, 2)[seen])

def test_a_cache_that_stays_empty_is_an_error(tiny):
    model = copy.deepcopy(tiny[0]).train()
    model.gradient_checkpointing_enable()
    for prompt in ([1, 2], [1]):
        with pytest.raises(ValueError, match="cache stayed empty"):
            skpo.response_logprobs(model, [prompt], [[3]])

@pytest.mark.parametrize("chunk", [1, 5, 17, 100])
def test_chunked_logprobs_for_any_chunk(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30)
    hidden = torch.randn(17, 8, requires_grad=True)
    targets = torch.randint(30, (17,))
    probabilities = (head(hidden) / 0.7).softmax(-1)  # [17, 30]
    expected = probabilities.log()[torch.arange(17), targets]  # [17]
    logprobs = skpo.chunked_logprobs(head, hidden, targets, 0.7, chunk)
    assert near(logprobs, expected)
    gradient, = torch.autograd.grad(logprobs.square().sum(), hidden)
    expected_gradient, = torch.autograd.grad(expected.square().sum(), hidden)
    assert near(gradient, expected_gradient)

# ---- 11. Problems and the model
@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the model's folder, to be broken."""
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    return path

def load(path, **settings):
    return skpo.load_model(config(model=str(path), **settings))

# -- problem files
def test_a_line_has_a_question_or_problem_and_an_answer(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        '{"question": "a", "answer": "two\\n#### 2"}',
        "",
        '{"problem": "b", "answer": 27.0}',
        '{"question": null, "problem": "c", "answer": "\\\\boxed{3}"}',
    ]
    path.write_text("\n".join(lines))
    found = [(problem.question, problem.answer) for problem in skpo.load_problems(path)]
    assert found == [("a", "2"), ("b", "27.0"), ("c", "3")]

def test_the_further_fields_of_a_line_are_kept(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a", "answer": 1, "level": 5, "tests": ["x"]}')
    [problem] = skpo.load_problems(path)
    assert problem.row == {"level": 5, "tests": ["x"]}

def test_an_answer_may_be_absent_where_none_is_needed(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a", "level": 5}\n{"question": "b", "answer": "#### 7"}')
    found = skpo.load_problems(path, needs_answer=False)
    assert found == [Problem("a", "", row={"level": 5}), Problem("b", "7")]
    assert 'and an "answer"' in refusal(skpo.load_problems, path)

@pytest.mark.parametrize("line", [
    '{"question": "a", "answer": "#### "}',
    '{"question": "a", "answer": true}',
    '{"question": "a", "answer": null}',
    '{"question": "a", "answer": ["1"]}',
    '{"question": " ", "answer": 1}',
    '{"question": 3, "answer": 1}',
    '{"question": "1"}',
    '{"answer": "1"}',
    '["1", "1"]',
    '"1"',
    "\0",
    "[" * 9**5,
])
def test_the_first_bad_line_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n\n' + line)
    message = refusal(skpo.load_problems, path)
    assert message.startswith(f"{path}, line 3: it must be JSON Lines")
    assert len(message) < len(str(path)) + 250

ROW = {"question": "a", "answer": "1"}

@pytest.mark.parametrize("content, shown", [
    (json.dumps([ROW, ROW]).encode(), '[{"question"'),
    (json.dumps([ROW, ROW], indent=1).encode(), "b'['"),
    (b"PAR1\x15\x04\x15", "PAR1\\x15\\x04"),
    (gzip.compress(b"x", mtime=0), "\\x1f\\x8b\\x08"),
    (f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n".encode("utf-16"), "\\xff\\xfe{\\x00"),
    (b'{"prompt": "a", "solution": "1"}', '{"prompt": "a"'),
    (b'{"prompt": [{"role": "user"}], "reward_model": {}}', '{"prompt": [{"role"'),
    (b"\x1b[2Jquestion", "\\x1b[2Jquestion"),
])
def test_what_is_not_json_lines_is_shown_safely(tmp_path, content, shown):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    message = refusal(skpo.load_problems, path)
    assert "line 1: it must be JSON Lines" in message
    assert shown in message
    assert message.isprintable()

def test_small_numbers_are_written_out(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a", "answer": 0.00001}\n{"question": "b", "answer": 27.0}')
    assert [problem.answer for problem in skpo.load_problems(path)] == ["0.00001", "27.0"]

def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n")
    assert "is empty" in refusal(skpo.load_problems, path)

def test_built_in_sums_are_right():
    found = skpo.load_problems("sums")
    assert len(found) == 2048
    for problem in found:
        assert len(problem.question) == 6
        assert sum(map(int, problem.question)) % 10 == int(problem.answer)

def test_built_in_arithmetic_is_right():
    found = skpo.load_problems("arithmetic")
    assert len({problem.question for problem in found}) == len(found) > 2000
    for problem in found:
        expression = problem.question.removeprefix("What is ").removesuffix("?")
        assert eval(expression) == int(problem.answer)  # written by us, not by a model

# -- the data of a run
def questions(problems):
    return [problem.question for problem in problems]

def test_the_held_out_split_is_the_same_whatever_the_flags(tiny):
    train, tests = skpo.load_data(config(), *tiny)
    held_out = questions(tests["held-out"])
    assert len(train) == 1792
    assert len(set(questions(train) + held_out)) == 2048
    assert (train[0].question, held_out[0]) == ("004968", "563530")  # as in earlier versions
    other = config(seed=1, algo="grpo", max_prompt_tokens=9, eval_problems=9)
    train_again, tests_again = skpo.load_data(other, *tiny)
    assert questions(train_again) == questions(train)
    assert questions(tests_again["held-out"]) == held_out[:9]

def write_problems(path, names):
    rows = [json.dumps({"question": name, "answer": r"\boxed{3}"}) for name in names]
    path.write_text("\n".join(rows))
    return str(path)

def test_dropped_problems_are_said_aloud(tiny, tmp_path, capsys):
    source = write_problems(tmp_path / "a", ["12", "1" * 30])
    _, tests = skpo.load_data(config(eval_data=source, max_prompt_tokens=20), *tiny)
    assert questions(tests[source]) == ["12"]
    assert f"{source}: 1 of 2 problems have prompts of 1 to 20 tokens" in capsys.readouterr().out

def test_evaluation_files_may_have_spaces_between_them(tiny, tmp_path):
    first = write_problems(tmp_path / "a", ["1"])
    second = write_problems(tmp_path / "b", ["2"])
    _, tests = skpo.load_data(config(eval_data=f" {first}, {second} ,"), *tiny)
    assert list(tests) == [first, second]

def test_too_few_problems_name_the_flag_that_helps(tiny, tmp_path, monkeypatch):
    few = write_problems(tmp_path / "few", "123456789")  # one is held out
    long = write_problems(tmp_path / "long", ["1" * 30] * 40)
    plan = config(data=few, prompts_per_step=9)
    message = refusal(skpo.load_data, plan, *tiny)
    assert "8 problems are too few, 9 are needed: lower --prompts_per_step" in message
    message = refusal(skpo.load_data, replace(plan, data=long, max_prompt_tokens=30), *tiny)
    assert "raise --max_prompt_tokens" in message
    monkeypatch.setattr(tiny[0].config, "max_position_embeddings", 60)  # 60 - 24 - 12 = 24
    message = refusal(skpo.load_data, replace(plan, data=long), *tiny)
    assert "context" in message and "--max_new_tokens" in message

def with_context(tiny, length):
    """A model whose config allows so many positions."""
    settings = {**tiny[0].config.to_dict(), "max_position_embeddings": length}
    return transformers.Qwen2Model(transformers.Qwen2Config(**settings))

def test_prompts_leave_room_for_segment_and_response(tiny):
    model = with_context(tiny, 100)
    plan = config(max_new_tokens=20, init_length=10, split_high=0.33)
    assert skpo.room_for_prompts(model, plan) == 100 - 20 - 7
    assert skpo.room_for_prompts(model, replace(plan, init_length=50)) == 100 - 20 - 17
    assert skpo.room_for_prompts(model, replace(plan, init_length=5000)) == 100 - 20 - 20
    assert skpo.room_for_prompts(model, replace(plan, max_prompt_tokens=30)) == 30

def test_a_context_too_short_says_so(tiny):
    model = with_context(tiny, 64)
    message = refusal(skpo.room_for_prompts, model, config(max_new_tokens=3072))
    assert "context of 64 tokens" in message and "lower --max_new_tokens" in message

LONGROPE = dict(rope_type="longrope", rope_theta=1e4, long_factor=[4.0] * 4, short_factor=[1.0] * 4)

@pytest.mark.parametrize("rope, context", [
    (None, 128), (dict(LONGROPE, original_max_position_embeddings=64), 64)])
def test_longrope_ends_the_context_where_its_frequencies_change(rope, context):
    settings = transformers.Phi3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, pad_token_id=0,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        original_max_position_embeddings=64, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    assert skpo.context_length(model) == context
    start = torch.arange(20)[None]
    row = torch.arange(20).repeat(4)[None]  # a row of 80 passes 64
    with torch.no_grad():
        first = model(start).logits[0, -1]
        again = model(row).logits[0, 19]
    assert torch.allclose(first, again, atol=1e-5) == (context == 128)

# -- prompts and the end of a turn
def chat_tokenizer(template, special=(), added=(), eos="</s>"):
    """A tokenizer of single characters, with that chat template and some tokens added to it."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "<unk>"]
    pieces = [(character, -1.0) for character in characters]
    unigram = tokenizers.models.Unigram(pieces, unk_id=len(pieces) - 1)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(unigram), unk_token="<unk>", eos_token=eos)
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    return tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n"
    "{% else %}### Response:\n{{ m.content }}\n<|EOT|>\n{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role.title() }}: {{ m.content }}\n\n{% endfor %}User:"
REFUSES = "{% for m in messages if m.role != 'user' %}{{ raise_exception('no') }}{% endfor %}"

@pytest.mark.parametrize("template, special, added, end", [
    (CHATML, CHATML_TOKENS, [], "<|im_end|>"),
    (LLAMA2, [], [], "</s>"),
    (LLAMA3, ["<|start|>", "<|end|>", "<|eot_id|>"], [], "<|eot_id|>"),
    (DEEPSEEK, [], ["<|EOT|>"], "<|EOT|>"),
    (LLAMA2.replace(" </s>", "\n"), [], [], None),
    (CHATML, [], [], None),  # the tokens of a template that nobody added are characters
    (PLAIN, [], [], None),
    (REFUSES, [], [], None),
    ("{{ messages[0].content }}", [], [], None),
    (None, [], [], None),
])
def test_the_end_of_a_turn_is_the_added_token_after_a_message(template, special, added, end):
    tokenizer = chat_tokenizer(template, special, added)
    expected = tokenizer.convert_tokens_to_ids(end) if end else None
    assert skpo.end_of_turn(tokenizer) == expected

def test_the_embedded_template_has_no_end_of_turn(tiny):
    assert skpo.end_of_turn(tiny[1]) is None

def test_a_prompt_is_in_the_chat_template_unless_told_otherwise():
    tokenizer = chat_tokenizer(CHATML, CHATML_TOKENS)
    text = tokenizer.decode(skpo.prompt_ids(tokenizer, " 1+1"))
    assert text.startswith("<|im_start|>user\n1+1\nPlease reason step by step")
    assert text.endswith("\\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(skpo.prompt_ids(tokenizer, "1+1", "none")) == "1+1"
    tokenizer.chat_template = None
    assert tokenizer.decode(skpo.prompt_ids(tokenizer, "1+1")).endswith("\\boxed{}.\n")

def test_an_eos_that_a_tokenizer_appends_is_no_part_of_a_prompt():
    tokenizer = chat_tokenizer(None)
    ending = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[
        ("</s>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ending
    assert tokenizer("1+1")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(skpo.prompt_ids(tokenizer, "1+1", "none")) == "1+1"
    assert skpo.prompt_ids(tokenizer, "", "none") == []

SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
    num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)

def save_model(path, name, tokenizer, **settings):
    """A random model of that architecture as a folder with that tokenizer."""
    settings = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)

@pytest.mark.parametrize("template", ["auto", "none"])
def test_a_base_model_stops_at_its_eos_and_at_the_end_of_a_turn(tmp_path, template):
    tokenizer = chat_tokenizer(CHATML, CHATML_TOKENS, eos="<|endoftext|>")
    eos, _, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", *CHATML_TOKENS])
    save_model(tmp_path, "Qwen2", tokenizer, eos_token_id=eos)
    model, _ = load(tmp_path, template=template)
    assert model.generation_config.eos_token_id == [eos, end]
    model.save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [eos, end]

def test_of_a_generation_config_only_what_ends_a_response_stays(copied):
    hostile = GenerationConfig(eos_token_id=[4, 7], do_sample=True, top_k=2, repetition_penalty=3.0)
    hostile.save_pretrained(copied)
    model, _ = load(copied)
    assert model.generation_config.eos_token_id == [4, 7, 13]  # 13: the tokenizer's
    assert model.generation_config.top_k == GenerationConfig().top_k
    assert model.generation_config.repetition_penalty == GenerationConfig().repetition_penalty

# -- models that are refused
SMALL_LOGITS = dict(initializer_range=1e-3)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
    linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)

@pytest.mark.parametrize("name, words, settings", [
    ("Qwen2", None, {}),
    ("Llama", None, dict(tie_word_embeddings=True)),
    ("GPT2", None, dict(n_embd=32, n_layer=2, n_head=2)),
    ("Gemma2", None, dict(final_logit_softcapping=None)),
    ("Granite", None, dict(logits_scaling=1.0)),
    ("Gemma2", "final_logit_softcapping", SMALL_LOGITS),
    ("Granite", "logits_scaling", dict(logits_scaling=3.0, **SMALL_LOGITS)),
    ("Cohere", "logit_scale", SMALL_LOGITS),
    ("Lfm2", "recurrent states", dict(layer_types=["conv", "full_attention"])),
    ("FalconH1", "recurrent states", MAMBA),
    ("Mamba", "recurrent states", dict(state_size=4)),
    ("Jamba", "recurrent states", dict(num_experts=2, mamba_d_state=4, mamba_dt_rank=4,
                                       attn_layer_period=2, attn_layer_offset=1)),
    ("Qwen3Next", "recurrent states", dict(LINEAR, num_experts=2, moe_intermediate_size=16,
                                           shared_expert_intermediate_size=16)),
    ("Bert", "it is not causal", dict(initializer_range=1.0)),
])
def test_models_whose_policy_would_be_wrong_are_refused(name, words, settings, tmp_path, tiny):
    save_model(tmp_path, name, tiny[1], **settings)
    if words is None:
        model, _ = load(tmp_path)
        assert model.dtype == torch.float32
    else:
        message = refusal(load, tmp_path)
        assert message.startswith(f"cannot use --model {tmp_path}: ")
        assert words in message

def change_weights(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

def test_missing_weights_are_named(copied):
    def lose_two(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        del weights["model.layers.0.mlp.up_proj.weight"]
    change_weights(copied, lose_two)
    message = refusal(load, copied)
    assert "lack 2 of its weights, the first is model.layers.0.mlp.up_proj.weight" in message

def test_a_reward_model_is_refused(tmp_path, tiny):
    settings = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForSequenceClassification(settings).save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    assert "the first is lm_head.weight" in refusal(load, tmp_path)

def test_a_wrong_shape_is_said_in_words(copied):
    def widen(weights):
        weights["model.norm.weight"] = torch.ones(65)
    change_weights(copied, widen)
    message = refusal(load, copied)
    assert "model.norm.weight has the shape [65] in its files, but [64]" in message

def test_weights_that_are_not_numbers_are_refused(copied):
    def spoil(weights):
        weights["model.norm.weight"][0] = math.nan
    change_weights(copied, spoil)
    assert "the weights are broken" in refusal(load, copied)

def test_pickles_are_refused(copied, tiny):
    (copied / "model.safetensors").unlink()
    torch.save(tiny[0].state_dict(), copied / "pytorch_model.bin")
    assert "cannot use --model" in refusal(load, copied)

def test_remote_code_is_refused(copied, tmp_path):
    settings = json.loads((copied / "config.json").read_text())
    settings["model_type"] = "stranger"
    settings["auto_map"] = {"AutoConfig": "code.Settings", "AutoModelForCausalLM": "code.Model"}
    (copied / "config.json").write_text(json.dumps(settings))
    (copied / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot use --model" in refusal(load, copied)
    assert not (tmp_path / "ran").exists()

@pytest.mark.parametrize("kept", [["adapter_config.json"], ["adapter_config.json", "config.json"]])
def test_a_lora_adapter_is_to_be_merged_first(copied, kept):
    (copied / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for path in copied.iterdir():
        if path.name not in kept:
            path.unlink()
    assert "it is a LoRA adapter: merge it into its base model first" in refusal(load, copied)

def test_ids_beyond_the_embedding_are_refused(copied):
    tokenizer = skpo.AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["<|im_start|>"])
    beyond = tokenizer.convert_tokens_to_ids("<|im_start|>")
    words = f"gives the id {beyond}, but its embedding ends at 14"
    tokenizer.save_pretrained(copied)
    model, tokenizer = load(copied)  # no prompt need hold it
    problems = [Problem("1<|im_start|>", "1")]
    assert words in refusal(skpo.fitting_problems, "x", problems, 1, model, tokenizer, config())
    tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}"
    tokenizer.save_pretrained(copied)
    assert words in refusal(load, copied)

def test_a_folder_without_tokenizer_files_is_refused(copied):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    assert "its files are missing" in refusal(load, copied)

def test_a_template_that_refuses_a_question_is_refused(copied):
    tokenizer = skpo.AutoTokenizer.from_pretrained(copied)
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    tokenizer.save_pretrained(copied)
    assert "a system message is needed" in refusal(load, copied)

def test_a_name_without_an_owner_is_qwens():
    assert "--model Qwen/qwen2.5-none: " in refusal(load, "qwen2.5-none")

# -- the embedded model
def test_characters_are_tokens_and_come_back(tiny):
    _, tokenizer = tiny
    text = "123=136\\boxed{6}<eos>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, 2, 3, 10, 1, 3, 6, 11, 6, 12, 13]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "123=136\\boxed{6}"
    assert tokenizer.decode(skpo.prompt_ids(tokenizer, "123")) == "123="

def test_another_alphabet_gives_another_model():
    model, tokenizer = skpo.character_model([*"01AB="], seed=0)
    assert tokenizer("A1=<eos>")["input_ids"] == [2, 1, 4, 5]
    assert model.config.eos_token_id == tokenizer.eos_token_id == 5
    assert model(torch.tensor([[0, 6]])).logits.shape == (1, 2, 7)

def text_of(tokenizer, row):
    return tokenizer.decode([token for token in row if token >= 0])

def test_documents_are_worked_sums(tiny):
    batch = next(skpo.worked_sums(seed=0, batch=2000, slips=0.2))
    attempts = batch[:, :6]
    ahead = (attempts >= 0).sum(1)
    assert abs((ahead > 0).mean() - 0.5) < 0.05
    assert set(ahead) == set(range(7))
    digits = batch[:, 6:12]
    work = batch[:, 13:19]
    steps = np.diff(work, axis=1, prepend=0) % 10  # what was added at each place
    assert abs((steps != digits).mean() - 0.2) < 0.02
    boxed = [f"={''.join(map(str, row))}\\boxed{{{row[-1]}}}<eos>" for row in work]
    for row, ending in zip(batch, boxed):
        assert text_of(tiny[1], row).endswith(ending)

def test_a_warm_up_teaches_what_follows_the_start():
    def counting():
        while True:
            first = np.random.default_rng(0).integers(8, size=(32, 1))
            row = (first + np.arange(6)) % 8
            row[::2, -1] = -1  # half of the documents are shorter
            yield row
    model, _ = skpo.character_model([*"01234567="], seed=0)
    skpo.pretrain(model, counting(), start=2, steps=60)
    logits = model(torch.tensor([[5, 6, 7, 0, 1], [1, 2, 3, 4, 5]])).logits
    assert logits.argmax(-1)[:, 1:].tolist() == [[7, 0, 1, 2], [3, 4, 5, 6]]

def test_the_same_seed_gives_the_same_embedded_model():
    first = skpo.embedded_model(3, steps=3)[0].state_dict()
    again = skpo.embedded_model(3, steps=3)[0].state_dict()
    other = skpo.embedded_model(4, steps=3)[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.norm.weight"], other["model.norm.weight"])

# ---- 10. Grading and evaluation
def test_evaluation_counts_right_and_truncated_responses(tiny, monkeypatch):
    texts = ["1", "3", "1.0", "", "2", "5", "5", "", "", "", "", ""]  # 3 problems, 4 samples each
    problems = [Problem("", answer, [i]) for i, answer in enumerate("12x")]

    def generate(model, tokenizer, prompts, n, *_):
        groups = []
        for prompt in prompts:
            first = 4 * prompt[0]
            groups.append([Sample([first + i], [0.0], i > 0, prompt) for i in range(n)])
        return groups

    def decode(ids, **_):
        return f"\\boxed{{{texts[ids[0]]}}}"

    monkeypatch.setattr(skpo, "generate", generate)
    tokenizer = SimpleNamespace(decode=decode)
    metrics = skpo.evaluate(tiny[0], tokenizer, problems, config())
    expected = dict(accuracy=3 / 12, pass_at_k=2 / 3, truncated=1 / 4, problems=3, samples=4)
    assert metrics == pytest.approx(expected)

def test_evaluation_takes_a_reward_of_ones_own(warm):
    _, tests = skpo.load_data(config(eval_problems=4), *warm)
    def even(response, problem):
        return 0.1 if len(response) % 2 == 0 else 0.0  # 0 is not right
    metrics = skpo.evaluate(*warm, tests["held-out"], config(), even)
    rollouts = skpo.answer_problems(*warm, tests["held-out"], config(), even)
    lengths = [len(r["text"]) for rollout in rollouts for r in rollout["responses"]]
    assert metrics["accuracy"] == np.mean([n % 2 == 0 for n in lengths])

# ---- 13. The run
def held_out_accuracy(model, tokenizer):
    _, tests = skpo.load_data(config(), model, tokenizer)
    return skpo.evaluate(model, tokenizer, tests["held-out"], config())["accuracy"]

def test_the_default_run_learns(quick, tmp_path):
    out = skpo.train(config(steps=40, eval_every=40, out=str(tmp_path)))
    before, after = metrics_of(out, "accuracy")
    assert before["accuracy"] <= 0.45
    assert after["accuracy"] >= before["accuracy"] + 0.33
    rows = metrics_of(out, "reward")
    assert all(math.isfinite(x) for row in rows for x in row.values())
    warm_up = [3e-5 * min(step, 10) for step in range(1, 41)]
    assert np.allclose([row["lr"] for row in rows], warm_up)
    saved = skpo.load_model(Config(model=str(out / "model")))
    assert held_out_accuracy(*saved) == after["accuracy"]

def test_the_warm_up_has_margin(warm):
    shorter = skpo.embedded_model(1, steps=300)
    assert abs(held_out_accuracy(*shorter) - held_out_accuracy(*warm)) < 0.08

def short(out, **settings):
    """The settings of a small run of the embedded task."""
    plan = dict(steps=4, prompts_per_step=8, eval_samples=1, eval_problems=64)
    plan |= dict(eval_every=2, save_every=1)
    return {**skpo.EMBEDDED, **plan, "out": str(out), **settings}

def flags(out, folder, **settings):
    """The same from a folder, as the embedded run would be."""
    as_embedded = dict(model=folder, data="sums", minibatches=4, group_size=8)
    plan = short(out, **{**as_embedded, **settings})
    return [f"--{name}={value}" for name, value in plan.items()]

@pytest.fixture
def short_run(quick, tmp_path, capsys):
    """A run of 4 steps: its folder, and what it printed."""
    out = skpo.train(Config(**short(tmp_path / "run")))
    return out, capsys.readouterr().out

def test_the_same_seed_gives_the_same_numbers(quick, tmp_path):
    runs = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        out = skpo.train(Config(**short(tmp_path / name, steps=2, seed=seed)))
        runs.append(metrics_of(out, "step"))
    assert runs[0] == runs[1] != runs[2]

def test_no_row_of_the_metrics_has_both_reward_and_accuracy(short_run):
    rows = metrics_of(short_run[0], "step")
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 2, 4]
    assert not any("reward" in row and "accuracy" in row for row in rows)

def test_rollouts_jsonl_has_one_whole_group_per_step(short_run):
    lines = read_lines(short_run[0] / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {*line} == {
            "step", "problem", "prompt", "segment", "value", "advantage", "responses"}
        assert len(line["responses"]) == 8
        rewards = [response["reward"] for response in line["responses"]]
        assert np.mean(rewards) == line["value"]
        assert min(rewards) < max(rewards)  # a prompt with right and wrong responses

def test_the_screen_shows_a_rollout_at_the_first_step_and_at_evaluations(short_run):
    shown = short_run[1]
    assert len(re.findall(r"segment '\d+' \(R_I [-+]\d\.\d\d, A [-+]\d\.\d\d\) \| prompt '\d+='",
                          shown)) == 3  # steps 1, 2 and 4
    assert len(re.findall(r"\n +prompt '\d+='", shown)) == 1  # step 0, without a segment
    right = re.findall(r"-> '\d+\\boxed\{\d\}' reward \+1 \(A \+\d\.\d\d\)", shown)
    wrong = re.findall(r"-> '\d+\\boxed\{\d\}' reward -1 \(A -\d\.\d\d\)", shown)
    assert len(right) >= 3 and len(wrong) >= 3

def test_the_last_lines_say_where_the_model_is_and_what_to_type(short_run):
    out, shown = short_run
    assert f"the model is in {out / 'model'}" in shown
    last = shown.splitlines()[-2:]
    assert f"--steps 0 --model {out / 'model'}" in last[0]
    assert f"--resume --out {out} --steps 8" in last[1]

def test_the_suggested_evaluation_gives_the_accuracy_of_the_run(quick, tmp_path, capsys):
    out = skpo.train(config(steps=1, out=str(tmp_path / "run")))
    shown = capsys.readouterr().out
    command = re.search(r"to evaluate it: .*? (--steps 0 .*)", shown)[1]
    skpo.main([*command.split(), f"--out={tmp_path / 'again'}"])
    [again] = metrics_of(tmp_path / "again", "accuracy")
    assert again["accuracy"] == metrics_of(out, "accuracy")[-1]["accuracy"]
    assert again["problems"] == 256

def test_evaluation_alone_trains_and_saves_nothing(quick, tmp_path, capsys):
    out = skpo.train(Config(**short(tmp_path / "x", steps=0, eval_every=0)))
    assert [row["step"] for row in metrics_of(out, "accuracy")] == [0]
    assert not (out / "model").exists()
    shown = capsys.readouterr().out
    assert "evaluation alone" in shown and "-> '" in shown and "segment" not in shown

def test_a_finished_run_that_is_resumed_says_so(folder, tmp_path, capsys):
    skpo.main(flags(tmp_path, folder, steps=1, eval_every=0))
    skpo.main(["--resume", f"--out={tmp_path}"])
    assert "all of its 1 steps are done; a higher --steps goes on" in capsys.readouterr().out

def test_a_lower_accuracy_and_truncation_are_said_aloud(tmp_path, capsys):
    first_accuracy = {}
    for accuracy in (0.5, 0.6, 0.4):
        right = [dict(text="", reward=1.0, advantage=0.0, truncated=True)] * round(10 * accuracy)
        wrong = [dict(text="", reward=-1.0, advantage=0.0, truncated=True)] * (10 - len(right))
        rollouts = [dict(responses=right + wrong)]
        skpo.log_evaluation(tmp_path, 1, "test", rollouts, first_accuracy, config())
    shown = capsys.readouterr().out
    assert re.findall(r"accuracy (\S+).*\n.*cut.*\n.*--w_up 0", shown) == ["0.400"]
    assert shown.count("100% of the responses were cut at --max_new_tokens 24") == 3

def test_text_of_a_model_cannot_move_the_cursor():
    hostile = "a\x1b[2J\r\n\u202e\x07\ud800b"
    assert skpo.printable(hostile) == r"'a\x1b[2J\r\n\u202e\x07\ud800b'"
    assert skpo.printable("Größe ∞") == "'Größe ∞'"
    assert len(skpo.printable("x" * 9999)) < 320

def test_an_error_cannot_move_the_cursor_either(tmp_path):
    with pytest.raises(SystemExit) as stop:
        skpo.main(["--model=x", f"--data={tmp_path}/\x1b[2J"])
    assert stop.value.code.endswith(r"/\x1b[2J")

def test_an_ascii_terminal_is_no_error():
    code = "import skpo; skpo.say(skpo.printable('∞ \\ud800'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == r"'\u221e \ud800'", done.stderr

def test_colours_are_for_terminals(monkeypatch):
    assert skpo.paint("x", "red") == "x"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert skpo.paint("x", "red") == "\x1b[31mx\x1b[0m"

def test_two_runs_in_the_same_second_have_two_folders(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(skpo.time, "strftime", lambda format: "now")
    plan = short("", steps=1, eval_every=0)
    folders = [skpo.train(Config(**plan)), skpo.train(Config(**plan))]
    assert [str(out) for out in folders] == ["runs/now-skpo-0", "runs/now-skpo-0-2"]

# -- checkpoints
KILLED = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
count = int(sys.argv.pop(1))
import skpo, torch

def killing(function):
    calls = iter(range(1, count + 1))
    def call(*arguments, **settings):
        if next(calls) == count:
            os.kill(os.getpid(), 9)
        return function(*arguments, **settings)
    return call
"""

def test_a_killed_run_goes_on_as_if_undisturbed(folder, tmp_path):
    skpo.main(flags(tmp_path / "whole", folder))
    killed = tmp_path / "killed"
    arguments = flags(killed, folder)
    for name, count in (("os.replace", 3), ("skpo.optimizer_step", 6), ("skpo.say", 6)):
        code = f"{KILLED}\n{name} = killing({name})\nskpo.main()"
        command = [sys.executable, "-c", code, str(HERE), str(count), *arguments]
        assert subprocess.run(command, timeout=90).returncode == -9
        assert (killed / "checkpoint.tmp").exists() == (name == "os.replace")
        arguments = ["--resume", f"--out={killed}"]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (killed / name).open("a") as log:
            log.write('{"step": 99, "torn')
    skpo.main(arguments)
    assert metrics_of(killed, "step") == metrics_of(tmp_path / "whole", "step")
    rollouts = (killed / "rollouts.jsonl").read_text()
    assert rollouts == (tmp_path / "whole" / "rollouts.jsonl").read_text()
    weights = (killed / "model/model.safetensors").read_bytes()
    assert weights == (tmp_path / "whole" / "model/model.safetensors").read_bytes()

def late_reward(response, problem):
    """Wrong twice, and then by the text."""
    late_reward.calls += 1
    return -1.0 if late_reward.calls <= 2 * 8 * 8 else float(len(set(response)) % 2)

def test_saving_changes_nothing_before_the_first_advantage(quick, tmp_path):
    runs = []
    for save_every in (1, 0):
        late_reward.calls = 0
        plan = short(tmp_path / str(save_every), save_every=save_every, eval_every=0, lr=1e-2)
        runs.append(metrics_of(skpo.train(Config(**plan), late_reward), "step"))
    assert [row["grad_norm"] > 0 for row in runs[0]] == [False, False, True, True]
    assert runs[0] == runs[1]

def test_an_evaluation_is_not_written_over(quick, tmp_path):
    plan = Config(**short(tmp_path, steps=0))
    skpo.train(plan)
    assert "is not empty" in refusal(skpo.train, plan)

def test_a_run_stopped_before_its_first_checkpoint_can_be_started_again(quick, tmp_path):
    plan = Config(**short(tmp_path / "run", steps=1))
    skpo.train(replace(plan, out=str(tmp_path / "whole")))
    out = skpo.train(plan)
    (out / "checkpoint.pt").rename(out / "checkpoint.tmp")  # as if killed in its last moment
    skpo.train(plan)
    assert metrics_of(out, "step") == metrics_of(tmp_path / "whole", "step")

def test_a_full_disk_costs_no_older_checkpoint(quick, tmp_path, monkeypatch):
    skpo.train(Config(**short(tmp_path, steps=1, eval_every=0)))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for owner, name in ((torch, "save"), (transformers.PreTrainedModel, "save_pretrained")):
        with monkeypatch.context() as patch:
            failing = MagicMock(side_effect=RuntimeError("No space left on device"))
            patch.setattr(owner, name, failing)
            with pytest.raises(SystemExit) as stop:
                skpo.main(["--resume", f"--out={tmp_path}", "--steps=2"])
        assert "GB are free on the disk" in stop.value.code
        assert "No space left" in stop.value.code
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
        assert not (tmp_path / "checkpoint.tmp").exists()

def test_a_bfloat16_checkpoint_holds_every_weight_in_float32(quick, tmp_path):
    out = skpo.train(Config(**short(tmp_path, steps=1, eval_every=0, dtype="bfloat16")))
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert {*saved["weights"]} == {*skpo.embedded_model(0)[0].state_dict()}
    assert {w.dtype for w in saved["weights"].values()} == {torch.float32}

def test_a_bfloat16_run_is_resumed_bit_for_bit(folder, tmp_path):
    settings = dict(dtype="bfloat16", eval_every=0, save_every=2)
    skpo.main(flags(tmp_path / "whole", folder, steps=3, **settings))
    skpo.main(flags(tmp_path / "part", folder, steps=2, **settings))
    skpo.main(["--resume", f"--out={tmp_path / 'part'}", "--steps=3"])
    assert metrics_of(tmp_path / "part", "step") == metrics_of(tmp_path / "whole", "step")

def my_reward(response, problem):
    return float(len(response) % 2)

def test_a_run_keeps_its_reward(folder, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "123456"}\n' * 16)  # without answers
    out = tmp_path / "run"
    skpo.main(flags(out, folder, steps=1, eval_every=0, data=data), my_reward)
    assert json.loads((out / "config.json").read_text())["reward"] == "my_reward"
    with pytest.raises(SystemExit, match="reward is my_reward, not math_reward"):
        skpo.main(["--resume", f"--out={out}", "--steps=2"])
    skpo.main(["--resume", f"--out={out}", "--steps=2"], my_reward)
    assert [row["step"] for row in metrics_of(out, "reward")] == [1, 2]

def test_a_run_is_not_resumed_with_other_data(folder, tmp_path):
    skpo.main(flags(tmp_path, folder, steps=1, eval_every=0))
    before = metrics_of(tmp_path, "step")
    few = tmp_path / "few.jsonl"
    few.write_text('{"question": "123", "answer": "6"}\n' * 16)
    size = "it knows 1792 problems, --data has 14"
    for data, words in ((few, size), ("arithmetic", "--template")):
        with pytest.raises(SystemExit, match=words):
            skpo.main(["--resume", f"--out={tmp_path}", f"--data={data}", "--steps=2"])
    assert metrics_of(tmp_path, "step") == before

# -- the user's mistakes
@pytest.fixture
def files(tmp_path, folder):
    """Data files, right and wrong; folders that hold runs, and models."""
    good = '{"question": "1", "answer": "1"}\n'
    contents = {
        "good": good * 16,
        "few": good * 8,
        "broken": good + "{oops",
        "run/metrics.jsonl": "precious",
        "torn/checkpoint.pt": "half of it",
        "torn/config.json": json.dumps(dict(vars(Config()), reward="math_reward")),
        "lora/adapter_config.json": "{}",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "nomodel").mkdir()
    shutil.copytree(folder, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "narrow")
    settings = (folder / "config.json").read_text().replace('embeddings": 32768', 'embeddings": 64')
    (tmp_path / "narrow/config.json").write_text(settings)
    return tmp_path

@pytest.mark.parametrize("wrong", [dict(algo="GRPO"), dict(ablation="no-skip"), dict(dtype="bf16")])
def test_a_choice_that_is_none_is_refused_in_python_too(wrong):
    assert "must be one of" in refusal(skpo.train, config(**wrong))

@pytest.mark.parametrize("arguments, words", [
    ("--model @/none", "no such folder"),
    ("--model qwen2.5-none", "--model Qwen/qwen2.5-none"),
    ("--model @/nomodel", "cannot use"),
    ("--model a/b/c", "no such folder"),
    ("--model @/torn", "its model is in @/torn/model"),
    ("--model @/lora", "it is a LoRA adapter"),
    ("--model @/narrow", "lower --max_new_tokens"),
    ("--model x --data @/none", "no file"),
    ("--model x --eval_data @/good,@/none", "no file"),
    ("--model @/model --data @/few", "lower --prompts_per_step"),
    ("--model @/model --data @/broken", "line 2: it must be JSON Lines"),
    ("--data @/good", "need a --model"),
    ("--out @/run", "is not empty"),
    ("--out @/model", "is not empty"),
    ("--out @/good", "cannot write"),
    ("--out @/good/x", "cannot write"),
    ("--resume --out=", "needs the run's folder"),
    ("--resume --out @/run", "no checkpoint"),
    ("--resume --out @/model", "no checkpoint"),
    ("--resume --out @/torn", "cannot resume"),
    ("--resume --out @/torn --steps 0", "--steps above 0"),
    ("--group_sze 4", "--group_sze"),
    ("--group_size 1", "at least 2 responses"),
    ("--prompts_per_step 0", "--prompts_per_step 0: it must be more than 0"),
    ("--minibatches 3", "multiple of --minibatches 3"),
    ("--lr nan", "--lr nan: it must be"),
    ("--lr 0", "--lr 0: it must be"),
    ("--lr fast", "invalid float"),
    ("--steps -1", "0 or more"),
    ("--split_low 0.6", "--split_high"),
    ("--split_high 2", "split_high <= 1"),
    ("--rho_min 0.99", "--rho_max"),
    ("--clip_low 1", "--clip_low must be below 1"),
    ("--temperature 0", "--steps 0"),
    ("--algo grpo --ablation no_mc", "not to --algo grpo"),
    ("--algo ppo", "invalid choice"),
])
def test_a_mistake_gets_one_line_and_loses_nothing(files, quick, capsys, arguments, words):
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    arguments = f"--out @/fresh {arguments}".replace("@", str(files))  # the last --out counts
    with pytest.raises(SystemExit) as stop:
        skpo.main(arguments.split())
    message = stop.value.code
    if message == 2:  # argparse
        message = capsys.readouterr().err.strip()
    assert words.replace("@", str(files)) in message
    assert "\n" not in message
    assert not (files / "fresh").exists()
    after = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    assert after == before

# ---- The README: its recipes on copies of skpo.py, its scripts in miniature
README = (HERE / "README.md").read_text(encoding="utf-8")

def small(**settings):
    """The settings of a step that takes a moment."""
    return config(**{**dict(prompts_per_step=8, minibatches=2, group_size=4), **settings})

def script(name):
    """The text of the README's one script of that name."""
    blocks = re.findall(rf"```python\n(# {name}\.py\n.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]

@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Runs a script of the README in this process. -> its global names, a dict."""
    def run(name, *arguments, source=None):
        path = tmp_path / f"{name}.py"
        path.write_text(source or script(name), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        return runpy.run_path(str(path), run_name="__main__")
    return run

# -- recipes
def replacements(title):
    """The blocks of a recipe: what each takes away, and what it puts there."""
    start = README.index(f"\n**{title}**")
    end = re.compile(r"\n\n(\*\*|#)").search(README, start).start()
    pairs = []
    for block in re.findall(r"```diff\n(.*?)```", README[start:end], re.DOTALL):
        lines = block.splitlines(keepends=True)
        old = [line[1:] for line in lines if line[0] != "+"]
        new = [line[1:] for line in lines if line[0] != "-"]
        pairs.append(("".join(old), "".join(new)))
    return pairs

@pytest.fixture
def changed(quick, tmp_path, monkeypatch):
    """Imports a copy of skpo.py with recipes applied; it takes the warm model, too."""
    def change(*titles):
        text = (HERE / "skpo.py").read_text(encoding="utf-8")
        for title in titles:
            pairs = replacements(title)
            assert pairs
            for old, new in pairs:
                assert text.count(old) == 1
                text = text.replace(old, new)
        path = tmp_path / "changed.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("changed", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "changed", module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "embedded_model", skpo.embedded_model)
        return module
    return change

KL = "A KL term"
REFERENCE = "A KL term towards a reference model"
FIRST_VISITS = "V' for first visits"

@pytest.mark.parametrize("titles", [["Another split"], [KL], [KL, REFERENCE], [FIRST_VISITS]])
def test_a_recipe_matches_once_and_the_changed_file_trains(titles, changed, warm, tmp_path):
    module = changed(*titles)
    c = module.Config(**vars(small(steps=1, eval_every=0, out=str(tmp_path / "run"))))
    out = module.train(c)
    model = skpo.AutoModelForCausalLM.from_pretrained(out / "model")
    for before, after in zip(warm[0].parameters(), model.parameters()):
        assert after.isfinite().all()
        assert not torch.equal(before, after)

def test_the_other_split_stays_in_its_range_and_is_early(changed):
    module = changed("Another split")
    rng = np.random.default_rng(0)
    t = [module.split_position(600, rng) for _ in range(3000)]
    assert 100 <= min(t) and max(t) <= 300
    assert np.mean(t) == pytest.approx(100 + 200 * 2 / 7, abs=3)

def rows_and_samples(warm, shift):
    """Rows of both phases, whose log-probs were `shift` nats higher when they were sampled."""
    torch.manual_seed(0)
    groups = skpo.generate(*warm, [[1, 2, 3, 4, 5, 6, 10], [7, 8, 10]], 2, 12)
    rows = []
    for i, sample in enumerate(groups[0] + groups[1]):
        then = [nats + shift for nats in sample.logprobs]
        sample = Sample(sample.tokens, then, sample.finished, sample.prompt)
        rows.append(Row(sample, 1.0, weight=0.1 * (i + 1), ppo_clip=i % 2 == 0))
    return rows

def added_loss(module, model, rows):
    """What a changed file's loss has more than the file's."""
    changed, _ = module.pass_loss(model, rows, small())
    plain, _ = skpo.pass_loss(model, rows, small())
    return (changed - plain).item()

def test_the_kl_term_is_k3_of_then_and_now(changed, warm):
    module = changed(KL)
    rows = rows_and_samples(warm, shift=0.3)
    added = added_loss(module, warm[0], rows)
    k3 = np.exp(0.3) - 0.3 - 1  # of every token
    weights = sum(row.weight * len(row.sample.tokens) for row in rows)
    assert added == pytest.approx(0.01 * k3 * weights, rel=1e-3)

def test_the_kl_term_can_be_one_towards_a_reference_model(changed, warm):
    module = changed(KL, REFERENCE)
    module.reference, _ = skpo.character_model(skpo.SUM_ALPHABET, 1)
    rows = rows_and_samples(warm, shift=0.0)
    added = added_loss(module, warm[0], rows)
    expected = 0.0
    for row in rows:
        s = row.sample
        _, theirs = plain_logprobs(module.reference, s.prompt, s.tokens)
        _, ours = plain_logprobs(warm[0], s.prompt, s.tokens)
        gap = theirs - ours
        expected += 0.01 * row.weight * (gap.exp() - gap - 1).sum().item()
    assert added == pytest.approx(expected, rel=1e-3)

@pytest.mark.parametrize("seen", [0, 3, 8])
def test_v_prime_is_the_unseen_prompts_mean_and_nothing_is_normalised(seen, changed, warm):
    module = changed(FIRST_VISITS)
    problems, _ = skpo.load_data(small(), *warm)
    state = module.initial_state(8, small())  # all eight are chosen
    state.values.count[:seen] = 1.0
    state.values.value[:seen] = np.linspace(-0.7, 0.5, seen)
    V = state.values.value.tolist()
    rows, rollouts, _ = module.collect(
        *warm, problems[:8], state, small(), skpo.math_reward)
    unseen = [r["value"] for r in rollouts if r["problem"] >= seen]
    assert len(unseen) == 8 - seen
    for group, rollout in zip(rows, rollouts):
        baseline = V[rollout["problem"]]
        if rollout["problem"] >= seen:
            baseline = sum(unseen) / len(unseen)
        assert rollout["advantage"] == pytest.approx(rollout["value"] - baseline, abs=1e-12)
        assert group[0].advantage == rollout["advantage"]

# -- rewards of one's own
ONE_STEP = ["--steps=1", "--prompts_per_step=4", "--eval_every=0", "--group_size=4"]

def test_a_short_right_answer_is_rewarded_and_a_long_one_is_not(quick, run_script, tmp_path):
    names = run_script("short_reward", *ONE_STEP, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["reward"] == "short_and_right"
    reward = names["short_and_right"]
    problem = skpo.Problem("1 + 1", "2")
    assert reward("\\boxed{2}", problem) == 1
    assert reward("\\boxed{3}", problem) == -1
    assert reward("so " * 1000 + "\\boxed{2}", problem) == -1

def test_math_verify_can_be_the_grader(quick, run_script, tmp_path):
    pytest.importorskip("math_verify")
    names = run_script("verified_reward", *ONE_STEP, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["reward"] == "verified"
    reward = names["verified"]
    problem = skpo.Problem("1 - 1/2", "0.5")
    assert reward("It is $\\boxed{\\frac{1}{2}}$.", problem) == 1
    assert reward("It is $\\boxed{\\frac{1}{3}}$.", problem) == -1
    assert reward("", problem) == -1

# -- curves
@pytest.fixture
def run_folder(quick, tmp_path):
    """The folder of a run of three steps, with two evaluations."""
    c = small(steps=3, eval_every=3, eval_problems=8, out=str(tmp_path / "run"))
    return skpo.train(c)

def test_pandas_draws_the_curves(run_folder, run_script):
    pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    names = run_script("plot", run_folder)
    accuracy, reward = names["axes"].lines
    assert list(accuracy.get_xdata()) == [0, 3]
    assert list(reward.get_xdata()) == [1, 2, 3]
    assert (run_folder / "curves.png").stat().st_size > 1000

def test_tensorboard_gets_the_metrics(run_folder, run_script):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_script("to_tensorboard", run_folder)
    events = EventAccumulator(str(run_folder))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("accuracy")] == [0, 3]

def test_wandb_gets_the_metrics(run_folder, run_script, monkeypatch):
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_script("to_wandb", run_folder)
    steps = [call.kwargs["step"] for call in wandb.log.call_args_list]
    assert steps == [0, 1, 2, 3, 3]

# -- loRA
def test_a_lora_model_trains_and_is_merged_before_it_is_saved(quick, run_script, warm, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "lora"
    run_script("lora", "--steps=2", "--prompts_per_step=4", "--out", out)
    merged, _ = skpo.load_model(small(model=str(out), template="none"))
    before = dict(warm[0].named_parameters())
    for name, weight in merged.named_parameters():
        adapted = "_proj.weight" in name
        assert torch.equal(weight, before[name]) != adapted

# -- analyses
def numbers_of(line):
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*", line)]

def test_signs_prints_what_the_readme_shows(run_script, capsys):
    run_script("signs")
    printed = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        spread, *shares = numbers_of(line)
        printed[spread] = shares
    shown = re.search(r"```\nspread n = 8 .*\n((?:  0\.\d\d .*\n)+)```", README)[1]
    for line in shown.splitlines():
        spread, *shares = numbers_of(line)
        assert shares == pytest.approx(printed[spread], abs=0.02)  # NumPy's streams may change

def test_shortcut_counts_answers_zero_advantages_and_tokens(quick, run_script, monkeypatch, capsys):
    box = skpo.SUM_ALPHABET.index("\\boxed{")
    close = skpo.SUM_ALPHABET.index("}")
    def generate(model, tokenizer, prompts, n, limits, c):
        groups = []
        for prompt in prompts:
            tokens = [[0, 0, 0, box, digit // 2, close] for digit in range(n)]
            groups.append([Sample(ids, [0.0] * 6, False, prompt) for ids in tokens])
        return groups
    monkeypatch.setattr(skpo, "distributed_generate", generate)
    names = run_script("shortcut", "--prompts_per_step=64")
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if "continual" in line or "skip" in line]
    right = sum(problem.answer in "0123" for problem in names["problems"]) / 64
    segments = [1, 1, 2, 2, 3, 3]  # 6 tokens times 1/6 to 1/2
    for i, (position, condition, *figures) in enumerate(table):
        assert condition == ["continual", "skip"][i % 2]
        tokens = 6 + segments[i // 2] * (condition == "continual")
        expected = [4, 1 - right, tokens, right / 4]  # four different answers, each of them twice
        assert np.allclose([float(figure) for figure in figures], expected, atol=0.006)
    assert len(table) == 12

def test_polarity_is_the_slope_of_the_entropy(quick, run_script, warm, capsys):
    names = run_script("polarity", "--prompts_per_step=4")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[0] for line in lines] == ["upstream", "downstream"]
    sample = names["rows"][0][1].sample
    entropy, polarity = names["entropy_and_polarity"](sample)
    ids = torch.tensor([sample.prompt + sample.tokens])
    logits = warm[0](ids).logits[0, len(sample.prompt) - 1:-1].double().detach()  # [T, V]
    uphill = torch.nn.functional.one_hot(torch.tensor(sample.tokens), 15) - logits.softmax(1)
    def entropy_of(logits):
        return torch.distributions.Categorical(logits=logits).entropy()
    after = entropy_of(logits + 1e-4 * uphill)
    before = entropy_of(logits - 1e-4 * uphill)
    assert torch.allclose(entropy, entropy_of(logits), atol=1e-5)
    assert torch.allclose(polarity, (after - before) / 2e-4, atol=1e-4)

def gradient(model, rows, c):
    """Of the loss of these Rows, one long vector."""
    trained = [row for row in rows if row.advantage]
    if not trained:
        return torch.zeros(model.num_parameters())
    loss, _ = skpo.pass_loss(model, trained, c)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])

def test_noise_is_that_of_the_gradients_themselves(quick, run_script, capsys):
    names = run_script("noise", "--prompts_per_step=6", "--seed=3")  # both are measurable here
    printed = capsys.readouterr().out.splitlines()[-2:]
    problem = torch.arange(24) // 4  # of four visits each
    others = problem[:, None] != problem  # [24, 24]
    for line, upstream in zip(printed, [True, False]):
        gradients = []  # [24] vectors
        for visits in names["rows_of"]:
            for group in visits:
                half = [row for row in group if row.ppo_clip == upstream]
                gradients.append(gradient(names["model"], half, names["config"]))
        gradients = torch.stack(gradients)  # [24, parameters]
        products = gradients @ gradients.T  # [24, 24]
        signal = products[others].mean().item()
        if signal > 0:
            expected = products.diag().mean().item() / signal - 1
            assert float(line.split()[-1]) == pytest.approx(expected, rel=0.02, abs=1)
        else:
            assert line.endswith("not measurable")

def test_noise_tells_monte_carlo_noise_from_segments(quick, run_script, capsys):
    names = run_script("noise", "--prompts_per_step=4", "--group_size=4")
    printed = {}
    for line in capsys.readouterr().out.splitlines():
        printed[line[:47].strip()] = line[47:].split()
    noise = []
    for rewards in names["R"].reshape(16, 4):
        mean = sum(rewards) / 4
        noise.append(sum((r - mean)**2 for r in rewards) / 3 / 4)
    noise = sum(noise) / 16
    assert float(printed["Monte Carlo noise of R_I"][0]) == pytest.approx(noise, abs=1e-4)
    within = [np.var(R_I, ddof=1) for R_I in names["R"].mean(2)]
    segments = float(printed["variance of R_I between segments of one prompt"][0])
    assert segments == pytest.approx(np.mean(within) - noise, abs=1e-4)

def test_implicit_compares_the_prefixes_of_two_runs(quick, run_script, tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        skpo.train(small(steps=1, seed=seed, eval_every=0, out=str(tmp_path / name)))
    capsys.readouterr()
    run_script("implicit", tmp_path / "a", tmp_path / "b", "embedded", "--eval_problems=16")
    table = [numbers_of(line) for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0] for row in table] == [20, 30, 40, 50]
    for cut, first, second, difference, error, pairs in table:
        assert 0 < first < 1
        assert 0 < second < 1
        assert difference == pytest.approx(first - second, abs=0.0011)
        assert 0 < error < 0.5
        assert 2 <= pairs <= 16

def test_implicit_refuses_an_evaluator_with_another_tokenizer(quick, run_script, tmp_path):
    skpo.train(small(steps=1, eval_every=0, out=str(tmp_path / "run")))
    for part in skpo.character_model([*"9876543210=", "\\boxed{", "}"], 0):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="must share a tokenizer"):
        run_script("implicit", tmp_path / "run", tmp_path / "run", tmp_path / "other")

def test_trap_trains_and_tells_the_share_of_plan_a(run_script, capsys):
    source = script("trap").replace("150_000", "3_000").replace("steps=400", "steps=60")
    names = run_script("trap", "--prompts_per_step=8", source=source)
    first, *_, last = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert first[0] == "0"
    assert 3000 <= int(last[0]) < 4500
    for line in (first, last):
        assert 0 < float(line[-3]) < 1  # accuracy
        assert 0 < float(line[-1]) < 1  # share of plan A
    sums = [0, 1, 3, 1, 3, 4]  # modulo 5
    assert names["work"]("A", [0, 1, 2, 3, 2, 1], 0.0)[1:] == sums
    assert names["work"]("B", [0, 1, 2, 3, 2, 1], 0.0)[1:] == sums[:4]

def test_gpu_check_runs_in_miniature(run_script, capsys):
    run_script("gpu_check", "--prompts_per_step=4", "--max_new_tokens=8")
    out = capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in out.splitlines() if line.startswith('{"step"')]
    assert steps == [1, 2, 3]
    assert out.count(" rows of ") == 4
    cosines = re.findall(r"gradient: cosine (\S+); of each parameter at least (\S+),", out)
    for whole, least in cosines:
        assert float(whole) > 0.999
        assert float(least) > 0.98
    ratios = re.findall(r"first ratio: (\S+) on average, 0 of", out)
    assert [float(ratio) for ratio in ratios] == pytest.approx([1, 1], abs=0.01)
    assert len(cosines) == 2

# ---- 9. Rewards: tables of raw text, one case a line
def rows_of(table, separator):
    """The (left, right) pairs of a table of raw text: one a line, # opens a heading."""
    lines = [line.strip() for line in table.splitlines()]
    rows = []
    for line in lines:
        if line and not line.startswith("#"):
            left, right = line.split(separator)
            rows.append((left.strip(), right.strip()))
    return rows

BOXES = r"""
# the last one counts, and of nested ones the inner one
\boxed{1} \boxed{\frac{1}{2}}  ->  \frac{1}{2}
\boxed{\boxed{5}}  ->  5
\boxed {5} it is  ->  5
# braces that are text
\boxed{\{1,2\}}  ->  \{1,2\}
\boxed{[0, \{}  ->  [0, \{
# one that was never closed: the response was cut off
\boxed{7} so it is \boxed{8  ->  None
\boxed{  ->  None
\boxed{\frac{1}{2}  ->  None
# nothing in it, or no box
\boxed{1} \boxed{}  ->  None
\boxed{ }  ->  None
\boxed  ->  None
5  ->  None
"""

EQUAL = r"""
# integers, thousands, decimals
1,000  ==  1000
x=1,000  ==  1000
12{,}345  ==  12345
10\,000  ==  10000
x=05  ==  5
5  ==  5 - -10 - 10
27.0  ==  27
−5  ==  -5
.5  ==  0.50
1.5\times 10^{3}  ==  1500
2^{10}  ==  1024
2**3  ==  8
# money, percent, units, degrees
\$5$  ==  5
\$1,234.50  ==  1234.5
50\%  ==  50
1,234\%  ==  1234
45°  ==  45 degrees
50^{\circ}\text{C}  ==  50
\theta = 30^\circ  ==  30
1°,2°,3°,4°  ==  4,3,2,1
4\pi\text{ cm}^3  ==  4\pi
8 \text{ cm}^2  ==  8
# fractions, mixed numbers
\frac12  ==  \frac{1}{2}
\frac{-3}{4}  ==  -\frac34
\frac\pi4  ==  \pi/4
\frac{1}{2}x  ==  x/2
\dfrac34  ==  0.75
\frac12\frac34  ==  \frac38
2\frac{1}{2}  ==  5/2
2 1/2  ==  2.5
-2\frac12  ==  -2.5
# roots, pi and e
2e-3  ==  2e - 3
\sqrt[3]{27}  ==  3
\sqrt[3]{-8}  ==  -2
\sqrt[3]{-1+9}  ==  2
2\sqrt[3]{-8}  ==  -4
\frac{\sqrt{3}}{3}  ==  \frac{1}{\sqrt3}
\sqrt{2}\frac12  ==  \frac{\sqrt2}{2}
3\sqrt{2}i  ==  3i\sqrt{2}
\sqrt[5]{-x}y  ==  -y\sqrt[5]{x}
\sqrt{0}  ==  0
sqrt(2)  ==  √2
\pi/2  ==  \frac{\pi}{2}
\frac{\pi}{4}-\frac12  ==  \frac{\pi-2}{4}
x^{2/3}  ==  \sqrt[3]{x^2}
# letters and polynomials
f(x)=2x  ==  2x
(x+1)^2  ==  x^2+2x+1
x(x+1)  ==  x^2+x
2^n(n-2)+1  ==  (n-2)2^n+1
2xy  ==  y x*2
a_{1}+a_2  ==  a_2+a_1
\lambda\mu  ==  \mu\lambda
\boldsymbol{5}  ==  5
# tuples, intervals, sets, lists
(1,2)  ==  ( 1, 2 )
\left(\frac12, 3\right)  ==  (0.5,3)
(p,q) = (3,2)  ==  (3,2)
\{1,2,3\}  ==  \{3,2,1\}
\left\{1,2\right\}  ==  \{1, 2\}
{1,2}  ==  \{1,2\}
1,2  ==  2, 1
\{1,2\}  ==  2,1
\$5, \$6  ==  5,6
x=2 \text{ or } x=3  ==  3,2
x=1, x=2 \text{ and } x=3  ==  1,2,3
x \in [1,2]  ==  [1,2]
[0,\frac12)  ==  [0,0.5)
(0,\frac12]  ==  (0,0.5]
(-\infty,3.0)  ==  (-∞,3)
3\pm2\sqrt2  ==  3-2\sqrt2, 3+2\sqrt2
x=\frac{1\pm\sqrt5}{2}  ==  \frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}
\infty  ==  infinity
(-∞,3]  ==  (-\infty, 3]
(0,1)\cup(2,3)  ==  (0, 1) \cup (2, 3)
\emptyset  ==  \varnothing
# words, choices, and what is compared as text
\text{A}  ==  A
(C)  ==  \text{C}
\text{Yes}  ==  yes
\text{no solution}  ==  no solution
x \leq 5  ==  x\le 5
x >= 5  ==  x \geq 5
a \leqslant 2  ==  a \le 2
x\neq3  ==  x \ne 3
1,\ldots  ==  1,\dots
\log_{2} 3  ==  \log_2 3
\begin{pmatrix}1&2\\3&4\end{pmatrix}  ==  \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
"""

DIFFERENT = r"""
# numbers
5  !=  6
1  !=  -1
50\%  !=  5
50\%  !=  0.5
0.33  !=  1/3
0.333333  !=  1/3
\frac13  !=  0.3333
0.\overline{3}  !=  0.3
0.1  !=  0.10001
1234567  !=  1234568.0
1450000.5  !=  1450000
1.5.5  !=  7.5
1000  !=  1,001
1,000  !=  1
1 000  !=  0
2 3  !=  6
12144  !=  12, 144
12 ,144  !=  12144
245  !=  0,245
0,5  !=  0,05
350, 0  !=  350,000 pages
350, 0  !=  350,000 m
(1,234)  !=  1234
(350,0)  !=  (350,000)
# fractions, mixed numbers
\frac123  !=  \frac{1}{23}
\frac120  !=  0
-2\frac{1}{2}  !=  -1.5
1 1 1/2  !=  3/2
\binom{5}{2}  !=  \frac{5}{2}
1/0  !=  1/0+1
\frac{0}{0}  !=  0
# powers and roots
-2^2  !=  4
2^{3^2}  !=  64
2^3  !=  8.5
2^{3}5  !=  2^{35}
2 10^{100}  !=  210^{100}
1.414  !=  \sqrt2
\sqrt10  !=  0
\sqrt{x^2}  !=  x
\sqrt[3]{x}  !=  \sqrt{x}
\sqrt{x}|y|  !=  \sqrt{x}y
(-1)^n  !=  (-1)^{n+1}
# large and small numbers, and numbers of another base
2^{100}  !=  2^{100}+1
2^{2024}+1  !=  2^{2024}-1
2^{-2024}  !=  3^{-2024}
1-\frac{1}{2^{2024}}  !=  1
10^{100}  !=  10^{100}+1
10^{100}+10^{-100}  !=  10^{100}
10^{40}+10^{-40}  !=  10^{40}
9^{9^{9^9}}  !=  1
1e-999  !=  0
1010_2  !=  1010
1_2  !=  12
0.12345678901234567891  !=  0.12345678901234567892
123456789012345678901  !=  123456789012345678902
# factorials
99999999!  !=  1
100!  !=  99!
1 000!  !=  1000!
2!3  !=  23
3!!  !=  720
5 factorial  !=  5
# letters
x  !=  y
x+1  !=  x+2
C  !=  D
i  !=  -i
3\mathrm{i}  !=  3
2 ab  !=  2
3 xy  !=  3 zw
x2  !=  2x
a_1  !=  c_0
a_{12}  !=  a_1
x_{12}  !=  x_{212}
x_{ab}  !=  x_{a}b
|x|/x  !=  1-i
|x-1|  !=  x-1
# functions
\sin x  !=  \cos x
\sin 30^\circ  !=  \sin 30
\log 2  !=  \ln 2
\log_{2}34  !=  \log_{23}4
I(0)  !=  0
I(1-1)  !=  0
I_0(0)  !=  0
f(2x)  !=  2f(x)
f^{-1}(0)  !=  0
f(x+x)  !=  2f(x)
2\text{arcsin}(x)  !=  \text{arcsin}(2x)
\sin(2x)  !=  2\sin(x)
ln(2x)  !=  2ln(x)
ln(2x+2)  !=  2ln(x+1)
arcsin(2x+2)  !=  2arcsin(x+1)
12\text{ mod }5  !=  12
# tuples, intervals, sets, lists
(1,2)  !=  (2,1)
(1,2)  !=  12
12  !=  1,2
1,2,...  !=  1,2
(0,1)  !=  [0,1]
[0,1)  !=  [0,1]
(1,2]  !=  (1,2)
[1,2]  !=  \{1,2\}
(1,2)  !=  {1,2}
(\frac12,2)  !=  {\frac12,2}
\{1,2\}  !=  \{1,3\}
\{1,2\}  !=  \{1,2,3\}
\{1,1\}  !=  \{1,2\}
\{1,2\},3  !=  1,2,3
\langle1,2\rangle  !=  \langle2,1\rangle
-(1,2)  !=  ()
-(1,2)  !=  (1,2)
2(1,2)  !=  (1,2,1,2)
(0,1)\cup(2,3),(4,5)  !=  (0,1),(2,3)\cup(4,5)
\begin{pmatrix}1&2\\3&4\end{pmatrix}  !=  \begin{pmatrix}1&2\\3&5\end{pmatrix}
(1,2,3,4)  !=  \begin{pmatrix}1&2\\3&4\end{pmatrix}
1,000y,x  !=  1,000xy
3\pm2  !=  5
\pm2  !=  2
\infty  !=  -\infty
\infty+1  !=  \infty
# labels, relations
x=5  !=  6
x+y=5  !=  5
xy=5  !=  5
x=1,2  !=  x=1,3
x=1,y=2  !=  x=2,y=1
x<5  !=  x<6
x\le5  !=  x<5
x \geq 5  !=  x \leq 5
x\le y  !=  y\le x
3:4  !=  3/4
# words and units
yes  !=  no
no  !=  on
\text{no solution}  !=  no
5 million  !=  5
3\text{ million}  !=  3
2 dozens  !=  2
2\text{ dozens}  !=  2
2 squared  !=  2
2g  !=  2
5m  !=  5
3 pm  !=  3 am
3\text{ pm}  !=  3\text{ am}
3\text{ to }5  !=  35
2\text{ ft }6\text{ in}  !=  26
5^\circ3  !=  53
5%3  !=  53
\$1\$2  !=  12
"""

HOSTILE = [
    r"x_{a_b_c_d_e_f_g_h_i_j_k_l_m_n_o_p_q_r_s_t_u_v_w_x_y_z}", "a_{" + "_" * 40 + "}",
    "9^{9^{9^9}}", "((((9^9)^9)^9)^9)^9", "(1+10^{-9})^{10^{9^9}}", "(-1)^{10^{40}+.5}",
    "0^{-1}", r"\sqrt[0]{5}", r"\sqrt[e]" * 20 + "7", "1" * 199, "1" * 200000, "1" * 190 + "e999",
    "1e999999999", "1e-999999999", "99999999!", "300!!!!", "69!" * 60, "2^" * 90 + "2",
    "x^-" * 66 + "x", "x^{x^{x^x}}", "(x+1)^{99999}", "((x+1)^{99}+(y+1)^{99})^{99}",
    "(1+e)^" * 33 + "7", "(1+e)^{2/3}(e-3)" * 12, "((e+1)^{.3}-3)^" * 13 + "7",
    "((-1)^{10^{99}+.5})^" * 9 + "7", "(-x)^{.3}" * 22, "(e+" * 49 + "7" + ")" * 49,
    "(" * 5000, "(" * 199, "(" * 99 + "7" + ")" * 99, "(1," * 39 + "7" + ")" * 39, "{" * 199,
    "{" * 90 + "}" * 90, r"\{" * 99, r"\{x," * 49, "[1," * 66, "-" * 199, "- " * 90 + "7",
    r"\frac" * 39, r"\frac{1}{" * 22, r"\sqrt" * 39 + "2", r"\sqrt{" * 33 + "2" + "}" * 33,
    r"\boxed{" * 20000, r"\text{" * 33, r"\text{a" * 28, "5\\text{" * 28, "1{,}" * 49, "{,}" * 66,
    "1,000" * 39, "(x,y," * 39 + "7", "a," * 99, "," * 199, "x=" * 99 + "7", "x_" * 99, "±" * 199,
    " " * 199, " m" * 99, "1 " * 99, "5 " * 99, "sin 3° " * 28, r"\sin" + "°" * 190,
    r"m\angle " * 22, "5 square " * 22, "\0", "\ud800", "²", "½", "٣", "lambda: 5", "x if x else y",
    "[x for x in x]", "x := 5", "f'5'", "'5' '5'", "5 #", "5\n+\n5", "1_000", "0x10", "5j", "...",
]

ATOMS = r"""1 23 . , x \frac \sqrt { } ( ) [ ] ^ _ ! | + - / \% = \text{ \cup e i \{ \} 9999 \times
\pm \pi \frac12 x^ in ' " # : ; @ ~ f( \lambda ** \\ &""".split()

def junk(count, seed=0):
    """That many texts of atoms in any order."""
    rng = random.Random(seed)
    atoms = [*ATOMS, " ", "\n", "\0", "\ud800"]
    return ["".join(rng.choices(atoms, k=rng.randint(3, 50))) for _ in range(count)]

def cpu_seconds(function, *arguments):
    """CPU time of one call that finds no cache; Python does not clean up meanwhile."""
    skpo.normal_form.cache_clear()
    gc.disable()
    start = time.process_time()
    function(*arguments)
    seconds = time.process_time() - start
    gc.enable()
    return seconds

@pytest.mark.parametrize("text, answer", rows_of(BOXES, "  ->  "))
def test_the_last_box_is_extracted(text, answer):
    assert str(skpo.extract_answer(text)) == answer

@pytest.mark.parametrize("given, answer", rows_of(EQUAL, "  ==  "))
def test_equal_answers_are_right_both_ways(given, answer):
    assert skpo.is_correct(f"so \\boxed{{{given}}}.", answer)
    assert skpo.is_correct(f"so \\boxed{{{answer}}}.", given)

@pytest.mark.parametrize("given, answer", rows_of(DIFFERENT, "  !=  "))
def test_different_answers_are_wrong_both_ways(given, answer):
    assert not skpo.is_correct(f"so \\boxed{{{given}}}.", answer)
    assert not skpo.is_correct(f"so \\boxed{{{answer}}}.", given)

@pytest.mark.parametrize("given", ["$", ".", r"\$", r"\,", ",", "~"])
def test_nothing_is_no_answer(given):
    assert not skpo.is_correct(f"\\boxed{{{given}}}", "")

def test_only_the_last_box_counts():
    assert not skpo.is_correct(r"\boxed{5} no, \boxed{6}", "5")
    assert not skpo.is_correct(r"\boxed{5} no, \boxed{6", "5")
    assert not skpo.is_correct("5", "5")

def test_a_reference_may_be_a_number():
    assert skpo.is_correct(r"\boxed{27}", 27.0)
    assert skpo.is_correct(r"\boxed{27}", 27)
    assert not skpo.is_correct(r"\boxed{27}", 28)

def test_normal_forms_are_hashable():
    forms = {skpo.normal_form(text) for text in ("1/2", "0.5", r"\{1,2\}", "2,1", "yes", "a<b")}
    assert len(forms) == 4

def test_the_reward_is_one_or_minus_one():
    problem = SimpleNamespace(answer="1/2")
    assert skpo.math_reward(r"\boxed{0.5}", problem) == 1.0
    assert skpo.math_reward(r"\boxed{5}", problem) == -1.0

def test_the_reward_asks_the_grader_of_the_module(monkeypatch):
    monkeypatch.setattr(skpo, "is_correct", str.endswith)
    assert skpo.math_reward("it is 5", SimpleNamespace(answer="5")) == 1.0

@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_are_wrong_and_quick(text):
    assert cpu_seconds(skpo.normal_form, text) < 0.2
    assert cpu_seconds(skpo.extract_answer, text) < 0.2
    assert not skpo.is_correct(f"\\boxed{{{text}}}", "77")

@pytest.mark.parametrize("seed", range(10))
def test_junk_is_wrong_and_quick(seed):
    for text in junk(200, seed):
        assert cpu_seconds(skpo.normal_form, text) < 0.2, text
        assert not skpo.is_correct(f"\\boxed{{{text}}}", "77"), text

@pytest.mark.parametrize("text", [
    r"\boxed{" * 25000 + "}" * 25000, r"\boxed" + " " * 200000, "\\" * 200001, "{" * 200000])
def test_long_responses_are_quick(text):
    assert cpu_seconds(skpo.is_correct, text, "77") < 0.2
    assert cpu_seconds(skpo.is_correct, r"\boxed{" + text, "77") < 0.2

def test_no_answer_is_run(tmp_path, monkeypatch):
    def forbidden(*arguments):
        raise AssertionError("an answer was run")
    monkeypatch.setattr("builtins.eval", forbidden)
    monkeypatch.setattr("builtins.exec", forbidden)
    path = tmp_path / "x"
    for code in (f"__import__('os').system('touch {path}')", f"open('{path}','w')",
                 f"(open)('{path}','w')", "x.__class__", "2+2", r"\frac{1}{2}"):
        skpo.normal_form.cache_clear()
        skpo.is_correct(f"\\boxed{{{code}}}", code)
    assert not path.exists()

def new_pairs(start):
    """500 pairs of expressions, none seen before."""
    pairs = []
    for i in range(start, start + 100):
        pairs += [(f"{i}", f"{i + 1}"), (f"-{i}.5", f"\\text{{no {i}}}"),
                  (f"\\frac{{{i}}}{{7}}", f"{i}/9"), (f"\\sqrt{{{i}}}", f"{i}\\pi"),
                  (f"({i}, x + {i})", f"({i}, x^2)")]
    return pairs

def test_a_thousand_new_verdicts_take_less_than_a_second():
    def judge(pairs):
        for given, answer in pairs:
            assert not skpo.is_correct(f"it is \\boxed{{{given}}}", answer)
    rounds = [cpu_seconds(judge, new_pairs(start)) for start in (1000, 2000, 3000)]
    assert 2 * min(rounds) < 1  # of 500 each; the fastest, for other programs slow the rest

# ---- 12. Several processes
def two_processes(script, *arguments):
    """Runs a Python file on two processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-m", *launcher, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

def three_steps(tiny):
    """What optimiser steps of 3, 1 and 3 passes give: norms and figures, gradients, weights."""
    rows = mini_batch(*tiny)
    c = config(micro_tokens=40)
    model = moved(tiny[0])
    skpo.shard(model, c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    kept = keep_gradients(optimizer)
    skpo.unshard(model)
    results = []
    for part in (rows, rows[1:3], rows):
        norm, figures = skpo.optimizer_step(model, optimizer, part, c)
        results += [torch.tensor(norm), figures]
    weights = skpo.state_dict_api.get_model_state_dict(model, options=skpo.WHOLE)
    return results + sum(kept, []) + list(weights.values())

def coin_reward(response, problem):
    """Two processes that each called it would have two rewards."""
    return float(np.random.default_rng().choice([-1.0, 1.0]))

TWO = """
import sys
import torch
import skpo
import test_skpo

expected, out = sys.argv[1:]
skpo.join_processes()
first = skpo.dist.get_rank() == 0
got = test_skpo.three_steps(skpo.embedded_model(0, steps=0))
if first:  # it alone has the whole weights
    for a, b in zip(got, torch.load(expected), strict=True):
        assert test_skpo.near(a, b, 1e-5)
    print("THE STEPS ARE THE SAME", flush=True)

# A run of one process goes on, with a random reward: rows are alike, or the processes would hang.
config = skpo.parse_config(["--resume", f"--out={out}", "--steps=3"])
skpo.train(config, test_skpo.coin_reward)
rows = test_skpo.read_lines(out + "/rollouts.jsonl")
told = [None, None]
skpo.dist.all_gather_object(told, rows)
assert told[0] == told[1]
if not first:
    1 / 0  # then all end
skpo.wait_for_all()
"""

def test_two_processes_are_one_and_fail_together(tiny, folder, tmp_path):
    samples = [row.sample for row in mini_batch(*tiny)]
    assert len(skpo.micro_batches(samples, 40)) == 3  # 2 for one process, 1 for the other
    torch.save(three_steps(tiny), tmp_path / "expected.pt")
    script = tmp_path / "two.py"
    script.write_text(TWO)
    out = tmp_path / "run"
    skpo.main(flags(out, folder, steps=1, eval_every=0), coin_reward)
    done = two_processes(script, tmp_path / "expected.pt", out)
    assert "THE STEPS ARE THE SAME" in done.stdout, done.stderr[-3000:]
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr, done.stderr[-3000:]
    skpo.main(["--resume", f"--out={out}", "--steps=4"], coin_reward)  # and one process again
    assert [row["step"] for row in metrics_of(out, "reward")] == [1, 2, 3, 4]
