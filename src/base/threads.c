/* Parallel loops (see threads.h): POSIX threads or the host's; after each thread's first task, one shared counter. Starting a thread costs about 20 µs, far
 * below any task worth splitting; sending one that spins at the host's barrier costs 1 or 2 (docs/decisions/005-lent-threads.md). */
#include "base/threads.h"

#include <pthread.h>
#include <stdatomic.h>

#include <arrowquant/base.h>

#include "base/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
aq_fp_state aq_fp_enter(void) {
    aq_fp_state state = {_mm_getcsr()};
    _mm_setcsr(0x1F80); /* all exceptions masked, round to nearest, no flush to zero */
    return state;
}
void aq_fp_leave(aq_fp_state state) { _mm_setcsr((unsigned)state.control); }
#elif defined(__aarch64__)
aq_fp_state aq_fp_enter(void) {
    aq_fp_state state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state.control));
    __asm__ volatile("msr fpcr, %0" : : "r"(UINT64_C(0)));
    return state;
}
void aq_fp_leave(aq_fp_state state) { __asm__ volatile("msr fpcr, %0" : : "r"(state.control)); }
#else
aq_fp_state aq_fp_enter(void) { return (aq_fp_state){0}; }
void aq_fp_leave(aq_fp_state state) { (void)state; }
#endif

static _Atomic(const aq_executor *) lent;

static void forget_executor(void) { atomic_store(&lent, NULL); }

void aq_set_executor(const aq_executor *executor) {
    static atomic_flag watched = ATOMIC_FLAG_INIT;
    if (executor && !atomic_flag_test_and_set(&watched) && pthread_atfork(NULL, NULL, forget_executor) != 0) {
        atomic_flag_clear(&watched); /* no memory for that: without it a child could hang, and the loops only lose speed */
        return;
    }
    atomic_store(&lent, executor);
}

bool aq_threads_ready(void) { return atomic_load_explicit(&lent, memory_order_relaxed) != NULL; }

enum { MAX_THREADS = 256 };

typedef struct {
    size_t n_tasks, n_threads; /* that take part; a host may send more */
    bool (*task)(void *, size_t);
    void *context;
    atomic_size_t next, n_started;
    atomic_bool stopped, is_taken[MAX_THREADS]; /* a thread's first task, by whoever came first */
} loop;

static void work(void *arg, int thread) {
    loop *l = arg;
    size_t seat = (size_t)thread;
    if (seat >= l->n_threads) return;
    aq_fp_state fp = aq_fp_enter();
    for (size_t i = seat; i < l->n_tasks && !atomic_load(&l->stopped); i = atomic_fetch_add(&l->next, 1)) {
        if (i < l->n_threads && atomic_exchange(&l->is_taken[i], true)) continue;
        if (!l->task(l->context, i)) atomic_store(&l->stopped, true);
    }
    aq_fp_leave(fp);
}

static void *thread_main(void *arg) {
    loop *l = arg;
    work(l, (int)atomic_fetch_add(&l->n_started, 1) + 1);
    return NULL;
}

void aq_wait_for(atomic_uint_fast64_t *counter, uint64_t value) {
    for (unsigned tries = 0; atomic_load_explicit(counter, memory_order_acquire) < value; tries++)
        if (tries > 64) sched_yield();
}

bool aq_parallel_for(size_t n_tasks, int n_threads, bool (*task)(void *context, size_t index), void *context) {
    pthread_t threads[MAX_THREADS];
    size_t wanted = (size_t)aq_cpu_threads(n_threads), started = 0;
    if (wanted > n_tasks) wanted = n_tasks;
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    loop l = {.n_tasks = n_tasks, .n_threads = wanted, .task = task, .context = context};
    const aq_executor *executor = wanted > 1 ? atomic_load(&lent) : NULL;
    if (executor && executor->run(executor->user, (int)wanted, work, &l)) return !atomic_load(&l.stopped);
    /* A thread that cannot be started is no failure: the others take its tasks. */
    while (started + 1 < wanted && pthread_create(&threads[started], NULL, thread_main, &l) == 0) started++;
    work(&l, 0);
    for (size_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
    return !atomic_load(&l.stopped);
}
