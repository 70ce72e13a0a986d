"""The lowest stage, the largest micro-batch, what would fit; times; what is read and written."""

from dataclasses import replace

import pytest
import torch

from pretrain.configfile import read_config
from pretrain.engine.layout import batch_layout
from pretrain.errors import InputError
from pretrain.plan.fit import fit, knobs, refusal, taken, with_micro_batch, with_stage
from pretrain.plan.flops import macs_by_part, training_flops
from pretrain.plan.job import Cluster
from pretrain.plan.memory.rank import rank_memory
from pretrain.plan.memory.states import optimized
from pretrain.plan.reading import checkpoint_bytes, data_set, run_steps
from pretrain.plan.seconds import Pace, exchange, flops_again, step_time
from pretrain.plan.traffic import Fabric
from pretrain.training.config import RunConfig

GIB = 1 << 30
PACE = Pace(100e12, 1e12, 50e9, Fabric(300e9, 100e9))


def job_of(*overrides, config="b16.json", ranks=8, dtype=torch.bfloat16, device="cuda"):
    read = read_config(RunConfig, config, overrides)
    layout = batch_layout(read.train.global_batch, read.train.micro_batch, ranks)
    return read.job(layout, dtype, device=device, steps=100)


def cluster_of(memory, ranks=8):
    return Cluster(1, ranks, round(memory), 989e12)


@pytest.fixture(scope="module")
def job():
    return job_of()


def test_the_lowest_stage_that_fits_is_taken_and_the_one_below_does_not_fit(job):
    needs = {stage: taken(with_stage(job, stage)) for stage in (1, 2, 3)}
    assert needs[1] > needs[2]
    found = fit(job, cluster_of(needs[1]), free_micro_batch=False)
    assert (found.fits, found.job.stage) == (True, 1)
    found = fit(job, cluster_of(needs[1] - 1), free_micro_batch=False)
    assert (found.fits, found.job.stage) == (True, 2)
    assert found.why.startswith(f"stage 1 would need {needs[1] / GIB:.1f} GiB")
    assert found.needs == needs
    assert not fit(job, cluster_of(min(needs.values()) - 1), free_micro_batch=False).fits


def test_half_precision_begins_at_stage_1_and_fp32_at_0(job):
    assert with_stage(job, 0) is None
    found = fit(job_of(dtype=torch.float32), cluster_of(80 * GIB), free_micro_batch=False)
    assert found.job.stage == 0


def test_the_largest_micro_batch_fits_and_the_next_does_not(job):
    limit = taken(with_micro_batch(job, 64)) + 1
    found = fit(job, cluster_of(limit), free_micro_batch=True)
    assert found.job.layout.micro_batch == found.largest == 64
    assert found.memory == rank_memory(found.job)
    assert taken(with_micro_batch(found.job, 128)) > limit


@pytest.mark.parametrize("memory", [2, 4, 6])
def test_what_is_said_to_fit_fits(job, memory):
    found = fit(job, cluster_of(memory * GIB), free_micro_batch=False)
    assert not found.fits
    for keys in found.remedies:
        config = read_config(RunConfig, "b16.json", keys)
        layout = batch_layout(4096, config.train.micro_batch, 8)
        changed = config.job(layout, torch.bfloat16, device="cuda", steps=100)
        assert taken(changed) <= memory * GIB


def test_a_run_is_refused_only_where_it_cannot_fit(job):
    least = rank_memory(job).allocated
    assert refusal(job, cluster_of(least)) is None
    said = refusal(job, cluster_of(least - 1))
    assert said.startswith("memory: a rank needs")
    assert "what would fit: train.micro_batch=" in said


def test_ranks_on_cpus_share_their_host():
    job = job_of("train.global_batch=64", "train.micro_batch=8", ranks=2, dtype=torch.float32, device="cpu")
    assert refusal(job, cluster_of(16 * GIB, ranks=2)) is None
    assert "the host has, shared by its 2 ranks, 2.0 GiB" in refusal(job, cluster_of(2 * GIB, ranks=2))


def test_each_knob_is_another_job_that_a_config_may_say(job):
    for change in knobs(job):
        config = read_config(RunConfig, "b16.json", change.keys)
        assert config.deepspeed.zero_optimization == change.job.deepspeed.zero_optimization
        assert config.train.activation_checkpointing == change.job.checkpointing
        assert config.train.micro_batch == change.job.layout.micro_batch
        assert config.train.compile == change.job.compiled
        assert change.job != job


def test_a_higher_stage_holds_no_more_of_the_state(job):
    def state(stage):
        memory = rank_memory(with_stage(job, stage))
        return memory.parameters + memory.gradients + memory.optimizer

    states = [state(stage) for stage in (1, 2, 3)]
    assert states == sorted(states, reverse=True)


def test_the_states_are_those_of_deepspeeds_own_estimators(job):
    """At stage 2 theirs count a rank's gradients in half precision too, which here are the backward pass's."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    values = optimized(job).values
    for stage in (2, 3):
        memory = rank_memory(with_stage(job, stage))
        ours = memory.parameters + memory.gradients + memory.optimizer
        if stage == 2:
            ours += 2 * values // 8
            _, theirs = estimate_zero2_model_states_mem_needs(values, 8, 1, cpu_offload=False)
        else:
            _, theirs, _ = estimate_zero3_model_states_mem_needs(
                values, 0, 8, 1, cpu_offload=False, cpu_offload_params=False, zero_init=True
            )
        assert ours == pytest.approx(theirs, rel=0.001)


def test_h14_by_hand():
    """633,685,480 values: bf16 weights, bf16 and fp32 gradients of all, fp32 weights and two moments of an eighth."""
    job = job_of("model.num_classes=1000", config="h14.json")
    memory, values = rank_memory(job), 633_685_480
    assert optimized(job).values == values
    assert memory.parameters == pytest.approx(2 * values, rel=1e-3)
    assert memory.gradients == pytest.approx(6 * values, rel=1e-3)  # DeepSpeed keeps those of a backward pass, too
    assert memory.optimizer == pytest.approx(12 * values / 8, rel=1e-3)
    assert checkpoint_bytes(job, values) == 12 * values


@pytest.mark.parametrize("overrides", [(), ("optimizer.averaging.decay=0.9",)])
def test_a_checkpoint_holds_4_bytes_a_value_and_kind(overrides):
    job = job_of(*overrides)
    assert checkpoint_bytes(job, 1000) == 1000 * (16 if overrides else 12)
    assert checkpoint_bytes(job_of("optimizer.name=sgd", *overrides), 1000) == 1000 * (12 if overrides else 8)


def test_full_checkpointing_computes_each_block_once_more(job):
    blocks = sum(macs for name, macs in macs_by_part(job.spec).items() if name not in ("patch_embedding", "head"))
    assert flops_again(job) == 0
    assert flops_again(replace(job, checkpointing="full")) == 2 * blocks
    assert flops_again(replace(job, checkpointing=3)) == pytest.approx(2 * blocks / 3)
    assert 0 < flops_again(replace(job, checkpointing="selective")) < blocks


def test_a_step_is_its_operations_at_the_pace_and_what_nothing_hides(job):
    values = optimized(job).values
    found = step_time(job, cluster_of(80 * GIB), values, PACE)
    assert found.compute == pytest.approx(512 * training_flops(job.spec) / 100e12)
    assert found.exposed == found.traffic.seconds  # DeepSpeed overlaps nothing under stage 1 if it is not told to
    assert found.total == pytest.approx(found.compute + found.exposed + found.update)
    hidden = job_of("deepspeed.zero_optimization.overlap_comm=true")
    assert step_time(hidden, cluster_of(80 * GIB), values, PACE).exposed == pytest.approx(found.traffic.parameters)


def test_gradients_are_reduced_in_fp32(job):
    assert exchange(job, 10).gradient_bytes == 4
    assert exchange(job, 10).parameter_bytes == 2
    assert exchange(job_of("deepspeed.communication_data_type=bf16"), 10).gradient_bytes == 2


def test_epochs_need_a_number_of_samples(job):
    assert run_steps(None, 7, 4096, 303_000_000) == round(7 * 303_000_000 / 4096)
    assert run_steps(12, None, 4096, None) == 12
    assert data_set(job, 18_291, None, None).samples == 303_000_000
    assert data_set(job, 18_291, 5, None).samples == 5
    with pytest.raises(InputError, match="--samples N"):
        run_steps(None, 7, 4096, data_set(job, 77, None, None).samples)
