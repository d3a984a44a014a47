/* Ordered work (see ordered.h): one mutex around a small window of open items. Parts are large (milliseconds), so a lock per part costs nothing. */
#include "base/ordered.h"

#include <pthread.h>
#include <time.h>

#include "base/cpu.h"
#include "base/file.h"
#include "base/threads.h"

#define MAX_THREADS 256
#define TICK_S 0.05

typedef enum { SLOT_OPEN, SLOT_READY, SLOT_FAILED } slot_state;

typedef struct {
    slot_state state;
    bool failed; /* a part failed; the others still run */
    size_t n_parts, next_part, n_running;
    uint64_t cost;
} slot;

typedef struct {
    const aq_ordered *work;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    slot slots[AQ_ORDERED_WINDOW];
    size_t head;   /* next item to commit */
    size_t tail;   /* next item to open */
    size_t cursor; /* no open item before it has a part left */
    size_t limit;  /* items from here on are not opened: an earlier one failed */
    uint64_t used;
    bool stopping;
    double last_tick;
} run;

typedef struct {
    run *r;
    size_t thread;
} worker;

static slot *slot_of(run *r, size_t item) { return &r->slots[item % AQ_ORDERED_WINDOW]; }

static void fail_item(run *r, size_t item) {
    slot_of(r, item)->failed = true;
    if (r->limit > item + 1) r->limit = item + 1;
}

/* Called with the lock. True when the next item may be opened: it is within the window and its cost fits, or nothing else is open. */
static bool open_next(run *r) {
    const aq_ordered *w = r->work;
    if (r->tail >= w->n_items || r->tail >= r->limit || r->tail - r->head >= AQ_ORDERED_WINDOW) return false;
    uint64_t cost = w->cost ? w->cost(w->context, r->tail) : 0;
    if (r->tail > r->head && (cost > w->budget || r->used > w->budget - cost)) return false;
    size_t item = r->tail++;
    slot *s = slot_of(r, item);
    *s = (slot){.state = SLOT_OPEN, .n_parts = 1, .cost = cost};
    r->used += cost;
    if (w->begin && !w->begin(w->context, item, &s->n_parts)) {
        fail_item(r, item);
        s->state = SLOT_FAILED;
    } else if (s->n_parts == 0) {
        s->state = SLOT_READY;
    }
    pthread_cond_broadcast(&r->changed);
    return true;
}

/* Called with the lock. */
static bool take_part(run *r, size_t *item, size_t *part) {
    for (;;) {
        for (; r->cursor < r->tail; r->cursor++) {
            slot *s = slot_of(r, r->cursor);
            if (s->state == SLOT_OPEN && !s->failed && s->next_part < s->n_parts) {
                *item = r->cursor;
                *part = s->next_part++;
                s->n_running++;
                return true;
            }
        }
        if (r->stopping || !open_next(r)) return false;
    }
}

/* Called with the lock, which is given up while the part and the item's end are computed. */
static void do_part(run *r, size_t item, size_t part, size_t thread) {
    const aq_ordered *w = r->work;
    slot *s = slot_of(r, item);
    pthread_mutex_unlock(&r->mutex);
    bool ok = w->part(w->context, item, part, thread);
    pthread_mutex_lock(&r->mutex);
    if (!ok) fail_item(r, item);
    s->n_running--;
    if (s->n_running > 0 || (!s->failed && s->next_part < s->n_parts)) return;
    aq_ordered_next next = s->failed ? AQ_ORDERED_FAIL : AQ_ORDERED_READY;
    if (!s->failed && w->end) {
        size_t n_parts = s->n_parts;
        pthread_mutex_unlock(&r->mutex);
        next = w->end(w->context, item, &n_parts);
        pthread_mutex_lock(&r->mutex);
        if (next == AQ_ORDERED_AGAIN) {
            s->n_parts = n_parts;
            s->next_part = 0;
            if (r->cursor > item) r->cursor = item;
        }
    }
    if (next == AQ_ORDERED_FAIL) {
        fail_item(r, item);
        s->state = SLOT_FAILED;
    } else if (next == AQ_ORDERED_READY || s->n_parts == 0) {
        s->state = SLOT_READY;
    }
    pthread_cond_broadcast(&r->changed);
}

static void *work_thread(void *arg) {
    worker *me = arg;
    run *r = me->r;
    aq_fp_state fp = aq_fp_enter();
    pthread_mutex_lock(&r->mutex);
    while (!r->stopping && r->head < r->work->n_items) {
        size_t item, part;
        if (take_part(r, &item, &part))
            do_part(r, item, part, me->thread);
        else
            pthread_cond_wait(&r->changed, &r->mutex);
    }
    pthread_mutex_unlock(&r->mutex);
    aq_fp_leave(fp);
    return NULL;
}

static bool tick(run *r) {
    double now = aq_now_s();
    if (!r->work->tick || now - r->last_tick < TICK_S) return true;
    pthread_mutex_unlock(&r->mutex);
    bool go_on = r->work->tick(r->work->context);
    pthread_mutex_lock(&r->mutex);
    r->last_tick = aq_now_s();
    return go_on;
}

static void wait_a_little(run *r) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)(TICK_S * 1e9);
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    pthread_cond_timedwait(&r->changed, &r->mutex, &until);
}

/* The caller's part, with the lock. */
static aq_ordered_result lead(run *r) {
    const aq_ordered *w = r->work;
    while (r->head < w->n_items) {
        if (!tick(r)) return AQ_ORDERED_CANCELLED;
        slot *s = slot_of(r, r->head);
        if (r->head < r->tail && s->state == SLOT_FAILED) return AQ_ORDERED_FAILED;
        if (r->head < r->tail && s->state == SLOT_READY) {
            pthread_mutex_unlock(&r->mutex);
            bool ok = w->commit(w->context, r->head);
            pthread_mutex_lock(&r->mutex);
            if (!ok) return AQ_ORDERED_FAILED;
            r->used -= s->cost;
            r->head++;
            pthread_cond_broadcast(&r->changed);
            continue;
        }
        size_t item, part;
        if (take_part(r, &item, &part))
            do_part(r, item, part, 0);
        else if (!(r->head < r->tail && slot_of(r, r->head)->state != SLOT_OPEN))
            wait_a_little(r);
    }
    return AQ_ORDERED_DONE;
}

aq_ordered_result aq_ordered_run(const aq_ordered *work, size_t *failed_item) {
    run r = {.work = work, .limit = SIZE_MAX, .mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER, .last_tick = aq_now_s()};
    pthread_t threads[MAX_THREADS];
    worker workers[MAX_THREADS];
    size_t wanted = (size_t)aq_cpu_threads(work->n_threads), started = 0;
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    /* A thread that cannot be started is no failure: the others take its parts. */
    for (; started + 1 < wanted; started++) {
        workers[started] = (worker){&r, started + 1};
        if (pthread_create(&threads[started], NULL, work_thread, &workers[started]) != 0) break;
    }
    aq_fp_state fp = aq_fp_enter();
    pthread_mutex_lock(&r.mutex);
    aq_ordered_result result = lead(&r);
    r.stopping = true;
    pthread_cond_broadcast(&r.changed);
    pthread_mutex_unlock(&r.mutex);
    for (size_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
    aq_fp_leave(fp);
    pthread_cond_destroy(&r.changed);
    pthread_mutex_destroy(&r.mutex);
    if (failed_item) *failed_item = r.head;
    return result;
}
