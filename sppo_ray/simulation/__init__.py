"""The real schedules and buffer in virtual time, between fakes that take as long as a rate card says.

clock: an event loop that jumps to its next timer. rates: the rate card. workload: lengths. gpu, workers, learner: the
fakes. run: one whole job. layouts: which split of the GPUs is best. Used by `sppo plan` and scripts/bench/schedule_sim.py.
"""
