"""The durable record and the learner's tasks: nothing lost, nothing doubled, the same task for the same step."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from groups import config, judged

from sppo_ray.buffer import TrainingBuffer
from sppo_ray.errors import SppoError
from sppo_ray.ledger import Ledger, LedgerDamaged
from sppo_ray.storage import StorageError
from sppo_ray.tables import generated_table
from sppo_ray.types import ReferenceTask, SaveTask, StopTask, TrainedIteration, TrainTask

NAMES = [f"p{i}" for i in range(10)]  # 10 prompts, batches of 4: 3 steps an epoch


def filled(cfg, iteration=1, names=NAMES) -> TrainingBuffer:
    buffer = TrainingBuffer(cfg)
    buffer.add([judged(name, iteration) for name in names])
    return buffer


def logps(n):
    return [(-float(i), -2.0 * i) for i in range(n)]


def test_a_run_begun_before_cut_responses_were_counted_goes_on(tmp_path):
    cfg = config(tmp_path)
    old = generated_table([judged(name) for name in NAMES[:5]], "paper").drop_columns(["cut_responses"])
    Ledger(cfg).append_table(1, old)
    buffer = filled(cfg, names=NAMES[5:])
    assert buffer.seal(1, NAMES).cut_responses == 0
    record = json.loads((tmp_path / "iter_1/sealed.json").read_text())
    del record["cut_responses"], record["xxh3"]
    (tmp_path / "iter_1/sealed.json").write_text(json.dumps(record))
    assert Ledger(cfg).sealed(1).groups == len(NAMES)


def test_a_group_is_in_the_table_whole():
    before = judged("p0")
    row = generated_table([before], "paper").to_pylist()[0]
    assert row["logits"] == before.logits.tolist()  # float32 values are exact in float64
    assert row["prompt_token_ids"] == before.group.prompt.token_ids.tolist()
    for k, response in enumerate(before.group.responses):
        question, answer = row[f"generate_{k}"]
        assert question == {"content": "text of p0", "role": "user"}
        assert answer == {"content": response.text, "role": "assistant"}
        assert row["response_token_ids"][k] == response.token_ids.tolist()
        kept = row["finish_reasons"][k], row["logprobs"][k], row["seeds"][k]
        assert kept == (response.finish_reason, response.logprob, response.seed)


def test_train_table_recomputed_from_raw_logits(tmp_path):
    filled(config(tmp_path)).seal(1, NAMES)
    generated = pq.read_table(tmp_path / "iter_1/generated.parquet").to_pylist()
    train = pq.read_table(tmp_path / "iter_1/train.parquet").to_pylist()
    assert [row["prompt_id"] for row in train] == NAMES
    for row, trained in zip(generated, train, strict=True):
        logits, k = row["logits"], 5
        s = [[(logits[i][j] - logits[j][i]) / 2 for j in range(k)] for i in range(k)]
        p = [[float(1 / (1 + np.exp(-x))) for x in r] for r in s]
        mean = [sum(r) / k for r in s]
        w, l = mean.index(max(mean)), mean.index(min(mean))  # noqa: E741
        assert trained["chosen"] == row[f"generate_{w}"]
        assert trained["rejected"] == row[f"generate_{l}"]
        assert (trained["chosen_probs"], trained["selected"]) == (p[w][l], [w, l])
        assert (trained["chosen_probs_win"], trained["chosen_probs_lose"]) == (sum(p[w]) / k, sum(p[l]) / k)


def test_sealed_tables_do_not_depend_on_the_order_of_arrival(tmp_path):
    filled(config(tmp_path / "a")).seal(1, NAMES)
    other = TrainingBuffer(config(tmp_path / "b"))
    for name in reversed(NAMES):
        other.add([judged(name), judged(name)])
    other.seal(1, NAMES)
    for file in ("generated", "train"):
        assert pq.read_table(tmp_path / f"a/iter_1/{file}.parquet").equals(
            pq.read_table(tmp_path / f"b/iter_1/{file}.parquet")
        )


def test_an_added_group_is_held_by_the_next_process(tmp_path):
    filled(config(tmp_path), names=NAMES[:3])
    again = TrainingBuffer(config(tmp_path))
    assert again.held(1) == frozenset(NAMES[:3])
    again.add([judged(name) for name in NAMES])
    assert TrainingBuffer(config(tmp_path)).seal(1, NAMES).groups == 10


def test_sealing_needs_every_prompt(tmp_path):
    with pytest.raises(SppoError, match="p9"):
        filled(config(tmp_path), names=NAMES[:9]).seal(1, NAMES)


def test_a_damaged_shard_is_set_aside_and_its_groups_made_again(tmp_path):
    filled(config(tmp_path), names=NAMES[:5])
    buffer = filled(config(tmp_path), names=NAMES[5:])
    shard = sorted((tmp_path / "iter_1/ledger").glob("shard-*.parquet"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert TrainingBuffer(config(tmp_path)).held(1) == frozenset(NAMES[5:])
    assert len(list((tmp_path / "iter_1/ledger").glob("*.corrupt"))) == 1
    del buffer


def test_a_shard_that_is_damaged_while_the_run_goes_on_is_found_by_the_sealing(tmp_path):
    buffer = filled(config(tmp_path))
    (shard,) = (tmp_path / "iter_1/ledger").glob("shard-*.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(LedgerDamaged, match="10 prompts have no undamaged group"):
        buffer.seal(1, NAMES)
    again = TrainingBuffer(config(tmp_path))  # as after a new start
    assert again.held(1) == set()
    again.add([judged(name) for name in NAMES])
    assert again.seal(1, NAMES).groups == 10


def test_a_policy_that_this_node_does_not_see_is_not_trained(tmp_path):
    buffer = filled(config(tmp_path, run__storage_patience_s=0))
    buffer.seal(1, NAMES)
    with pytest.raises(StorageError, match=r"run\.dir must be shared by all nodes.*iter_1/policy"):
        buffer.saved(TrainedIteration(1, 1, 3, "sum", str(tmp_path / "iter_1/policy")))
    assert buffer.trained(1) is None
    assert not (tmp_path / "iter_1/trained.json").exists()


def test_tasks_of_an_iteration_in_order(tmp_path):
    cfg = config(tmp_path, learner__epochs=2, schedule__iterations=1)
    buffer = filled(cfg)
    assert buffer.next_task(0) is None
    assert buffer.seal(1, NAMES).steps == 6
    assert buffer.next_task(0) is None  # sealed, but the schedule has not released it
    buffer.release(1)
    reference = buffer.next_task(0)
    assert isinstance(reference, ReferenceTask)
    assert [e.prompt_id for e in reference.examples] == NAMES
    buffer.record_reference(1, logps(10))
    tasks = [buffer.next_task(step) for step in range(6)]
    for epoch in (tasks[:3], tasks[3:]):
        rows = [e for task in epoch for e in task.examples]
        assert sorted(e.prompt_id for e in rows) == NAMES  # every prompt once an epoch
        assert {e.prompt_id: e.reference_logps for e in rows} == dict(zip(NAMES, logps(10), strict=True))
        assert [len(task.examples) for task in epoch] == [4, 4, 2]
    assert [e.prompt_id for e in tasks[0].examples] != [e.prompt_id for e in tasks[3].examples]  # shuffled anew
    assert [(t.step, t.step_in_iteration, t.steps_per_epoch) for t in tasks] == [(s, s, 3) for s in range(6)]
    assert buffer.next_task(6) == SaveTask(step=6, iteration=1, version=1)
    buffer.saved(TrainedIteration(1, 1, 6, "sum", "dir"))
    assert buffer.next_task(6) == StopTask()


def test_the_same_step_gives_the_same_rows_after_a_restart(tmp_path):
    cfg = config(tmp_path)
    buffer = filled(cfg)
    buffer.seal(1, NAMES)
    buffer.record_reference(1, logps(10))
    again = TrainingBuffer(cfg)
    assert again.next_task(0) is None  # a restart takes the release back
    for one in (buffer, again):
        one.release(1)
    for step in (2, 0, 1):
        one, other = buffer.next_task(step), again.next_task(step)
        assert isinstance(one, TrainTask)
        assert [e.prompt_id for e in one.examples] == [e.prompt_id for e in other.examples]
        assert [e.reference_logps for e in one.examples] == [e.reference_logps for e in other.examples]
    again.record_reference(1, [(9.0, 9.0)] * 10)  # a learner that restarted and computed it again changes nothing
    assert again.next_task(0).examples[0].reference_logps == buffer.next_task(0).examples[0].reference_logps


def test_steps_and_resume_point_go_on_over_iterations(tmp_path):
    cfg = config(tmp_path)
    buffer = filled(cfg)
    assert dataclasses.astuple(buffer.resume_point()) == (0, "base", 0)
    (tmp_path / "iter_1/policy").mkdir()
    buffer.seal(1, NAMES)
    assert buffer.resume_point().up_to == 0  # the reference is by the weights at the beginning
    buffer.record_reference(1, logps(10))
    assert buffer.resume_point().up_to is None  # any checkpoint of this iteration will do
    buffer.saved(TrainedIteration(1, 1, 3, "sum", str(tmp_path / "iter_1/policy")))
    again = TrainingBuffer(cfg)
    assert dataclasses.astuple(again.resume_point()) == (3, str(tmp_path / "iter_1/policy"), 3)
    assert again.next_task(3) is None
    again.add([judged(name, 2, version=1) for name in NAMES])
    again.seal(2, NAMES)
    again.release(2)
    again.record_reference(2, logps(10))
    task = again.next_task(4)
    assert (task.iteration, task.step_in_iteration, math.isclose(task.steps_per_epoch, 3)) == (2, 1, True)
    with pytest.raises(SppoError, match="step 1"):
        again.next_task(1)


def test_reference_of_the_wrong_length_is_refused(tmp_path):
    buffer = filled(config(tmp_path))
    buffer.seal(1, NAMES)
    with pytest.raises(ValueError, match="length 9"):
        buffer.record_reference(1, logps(9))


def test_summary_counts(tmp_path):
    same = judged("p0")
    responses = tuple(dataclasses.replace(r, text=" ") for r in same.group.responses)
    group = dataclasses.replace(same.group, responses=responses)
    biased = np.ones((5, 5), dtype=np.float32)
    buffer = TrainingBuffer(config(tmp_path))
    buffer.add([dataclasses.replace(same, group=group, logits=biased)])
    summary = buffer.seal(1, ["p0"])
    assert (summary.groups, summary.identical_groups, summary.empty_responses, summary.steps) == (1, 1, 5, 1)
    assert (summary.order_inconsistency, summary.cycle_rate) == (1.0, 0.0)


def test_what_a_killed_writer_left_does_not_stop_the_sealing(tmp_path):
    buffer = filled(config(tmp_path))
    (tmp_path / "iter_1/ledger/.shard-000001.parquet.123.tmp").write_bytes(b"half")
    buffer.seal(1, NAMES)
    buffer.release(1)
    assert isinstance(buffer.next_task(0), ReferenceTask)
    assert not (tmp_path / "iter_1/ledger").exists()


def test_ledger_of_an_empty_folder(tmp_path):
    ledger = Ledger(config(tmp_path))
    assert (ledger.read(1), ledger.sealed(1), ledger.reference(1), ledger.last_trained()) == (None, None, None, None)
