/* Parallel loops: every task once on started and on lent threads, whatever the host does with the work; a child of fork() does not use what was lent. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include <arrowquant/base.h>

#include "base/threads.h"

enum { TASKS = 1000 };
static atomic_int done[TASKS], at_once, most_at_once;

static bool count(void *context, size_t i) {
    int now = atomic_fetch_add(&at_once, 1) + 1, most = atomic_load(&most_at_once);
    while (now > most && !atomic_compare_exchange_weak(&most_at_once, &most, now)) {
    }
    atomic_fetch_add(&done[i], 1);
    atomic_fetch_sub(&at_once, 1);
    return i != *(size_t *)context;
}

static void run_all(int n_threads) {
    size_t none = TASKS;
    for (size_t i = 0; i < TASKS; i++) atomic_store(&done[i], 0);
    atomic_store(&most_at_once, 0);
    assert_true(aq_parallel_for(TASKS, n_threads, count, &none));
    for (size_t i = 0; i < TASKS; i++) assert_int_equal(atomic_load(&done[i]), 1);
    assert_true(atomic_load(&most_at_once) <= n_threads);
}

typedef struct host {
    int threads; /* that it sends, the caller's among them; 0: declines */
    atomic_int calls;
} host;

typedef struct job {
    void (*work)(void *, int);
    void *context;
    int thread;
} job;

static _Thread_local int this_thread;

static void *helper(void *arg) {
    job *j = arg;
    this_thread = j->thread;
    j->work(j->context, j->thread);
    return NULL;
}

static bool lend(void *user, int n_threads, void (*work)(void *, int), void *context) {
    host *h = user;
    pthread_t threads[8];
    job jobs[8];
    assert_true(n_threads > 1);
    h->calls++;
    if (!h->threads) return false;
    for (int i = 1; i < h->threads; i++) {
        jobs[i] = (job){work, context, i};
        assert_int_equal(pthread_create(&threads[i], NULL, helper, &jobs[i]), 0);
    }
    work(context, 0);
    for (int i = 1; i < h->threads; i++) pthread_join(threads[i], NULL);
    return true;
}

static void every_task_runs_once_on_lent_threads(void **state) {
    (void)state;
    for (int threads = 0; threads <= 7; threads++) { /* none, the caller alone, fewer and more than are asked for */
        host h = {threads, 0};
        aq_executor executor = {lend, &h};
        aq_set_executor(&executor);
        assert_true(aq_threads_ready());
        run_all(3);
        assert_int_equal(h.calls, 1);
        run_all(1); /* nobody is asked for the sake of the caller */
        assert_int_equal(h.calls, 1);
        aq_set_executor(NULL);
        assert_false(aq_threads_ready());
        run_all(3);
        assert_int_equal(h.calls, 1);
    }
}

typedef struct first_tasks {
    pthread_barrier_t all_have_begun; /* nobody takes a second task before */
    int thread[4];
} first_tasks;

static bool note_thread(void *context, size_t i) {
    first_tasks *f = context;
    if (i >= 4) return true;
    f->thread[i] = this_thread;
    pthread_barrier_wait(&f->all_have_begun);
    return true;
}

static void a_thread_begins_with_the_task_of_its_number(void **state) {
    (void)state;
    host h = {4, 0};
    aq_executor executor = {lend, &h};
    first_tasks f;
    aq_set_executor(&executor);
    for (int run = 0; run < 100; run++) {
        pthread_barrier_init(&f.all_have_begun, NULL, 4);
        assert_true(aq_parallel_for(9, 4, note_thread, &f));
        for (int i = 0; i < 4; i++) assert_int_equal(f.thread[i], i);
        pthread_barrier_destroy(&f.all_have_begun);
    }
    aq_set_executor(NULL);
}

static void a_failed_task_stops_the_loop(void **state) {
    (void)state;
    host h = {2, 0};
    aq_executor executor = {lend, &h};
    size_t failing = 5;
    for (int lent = 0; lent < 2; lent++) {
        aq_set_executor(lent ? &executor : NULL);
        for (size_t i = 0; i < TASKS; i++) atomic_store(&done[i], 0);
        assert_false(aq_parallel_for(TASKS, 1, count, &failing));
        assert_int_equal(atomic_load(&done[5]), 1);
        assert_int_equal(atomic_load(&done[6]), 0);
        assert_false(aq_parallel_for(TASKS, 2, count, &failing));
    }
    aq_set_executor(NULL);
}

static bool nested(void *context, size_t i) {
    size_t none = TASKS;
    (void)context, (void)i;
    return aq_parallel_for(10, 2, count, &none);
}

static void loops_nest_on_lent_threads(void **state) {
    (void)state;
    host h = {2, 0};
    aq_executor executor = {lend, &h};
    aq_set_executor(&executor);
    for (size_t i = 0; i < TASKS; i++) atomic_store(&done[i], 0);
    assert_true(aq_parallel_for(4, 2, nested, NULL));
    aq_set_executor(NULL);
    for (size_t i = 0; i < 10; i++) assert_int_equal(atomic_load(&done[i]), 4);
}

static void FA17_a_child_does_not_use_lent_threads(void **state) {
    (void)state;
    host h = {2, 0};
    aq_executor executor = {lend, &h};
    aq_set_executor(&executor);
    run_all(2);
    pid_t child = fork();
    if (child == 0) {
        size_t none = TASKS;
        bool ok = !aq_threads_ready() && aq_parallel_for(TASKS, 2, count, &none) && h.calls == 1;
        _exit(ok ? 0 : 1);
    }
    int status = -1;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_true(aq_threads_ready()); /* the parent keeps them */
    run_all(2);
    assert_int_equal(h.calls, 2);
    aq_set_executor(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_task_runs_once_on_lent_threads),   cmocka_unit_test(a_thread_begins_with_the_task_of_its_number),
        cmocka_unit_test(a_failed_task_stops_the_loop),           cmocka_unit_test(loops_nest_on_lent_threads),
        cmocka_unit_test(FA17_a_child_does_not_use_lent_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
