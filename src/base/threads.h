/* Parallel loops over independent tasks, on threads that live for one call, so that a process that forks between calls (Python workers) never inherits a
 * dead pool; or on those that the host lends (aq_set_executor in base.h).
 * Floating-point state is set to round-to-nearest with denormals kept in every thread that runs a task, and restored in the caller's (NU07). */
#ifndef AQ_BASE_THREADS_H
#define AQ_BASE_THREADS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Runs task(context, i) for each i in [0, n_tasks), on up to n_threads threads (0: all), the caller's among them. Thread i (the caller is 0) begins with
 * task i, so that a loop over spans meets the values that the same thread left in its cache; the other tasks are taken in rising order.
 * A task returns false to stop: no further task is started then. Returns false when a task did. What a task computes must not depend on the thread. */
bool aq_parallel_for(size_t n_tasks, int n_threads, bool (*task)(void *context, size_t index), void *context);
/* Waits until `counter` is `value` or more. For tasks that need others before them in the order: those are done, in the hands of a running
 * thread, or taken by the next that is free. */
void aq_wait_for(atomic_uint_fast64_t *counter, uint64_t value);
/* True when the host lends threads: they stand ready, so that a loop of some 10 µs is worth a second one; else one of 100 µs is. */
bool aq_threads_ready(void);

/* Floating-point control of the current thread: `enter` saves it and sets the default, `leave` restores it. */
typedef struct aq_fp_state {
    uint64_t control;
} aq_fp_state;
aq_fp_state aq_fp_enter(void);
void aq_fp_leave(aq_fp_state state);

#endif
