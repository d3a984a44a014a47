/* Interrupted runs: killed at every step and at random moments, continued, and equal to a run that was not interrupted. */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/mem.h"
#include "store/journal.h"
#include "store_samples.h"

enum { N_SAMPLES = 14 };
static sample g_samples[N_SAMPLES];

/* Large and small tensors in turn: row groups of one tensor and of several, some checkpoints, three files. */
static int make_samples(void **state) {
    (void)state;
    for (int i = 0; i < N_SAMPLES; i++) {
        char name[32];
        snprintf(name, sizeof name, "blocks.%d.weight", i);
        aq_quant_spec spec = {.bits = i % 3 ? 4 : 8, .group_size = 64, .axis = 1, .params = i % 2 ? AQ_PARAMS_F32 : AQ_PARAMS_F16};
        if (i % 4 == 1)
            sample_raw(&g_samples[i], name, AQ_F32, &(aq_shape){1, {500 + (uint64_t)i}}, (uint32_t)i);
        else if (i % 4 == 3)
            sample_raw(&g_samples[i], name, AQ_BF16, &(aq_shape){2, {700, 800}}, (uint32_t)i);
        else
            sample_quantized(&g_samples[i], name, i % 4 == 0 ? 1100 : 60, 1008, spec, (uint32_t)i);
        if (i % 4 == 0) sample_extend(&g_samples[i], i == 4);
    }
    return 0;
}

static int free_samples(void **state) {
    (void)state;
    for (int i = 0; i < N_SAMPLES; i++) sample_free(&g_samples[i]);
    return 0;
}

static aq_store_writer_options options_for(const char *fingerprint) {
    aq_store_writer_options o = sample_options(fingerprint);
    o.predicted_bytes = 1; /* checkpoints as close as they come */
    o.shard_bytes = 4000000;
    return o;
}

static aq_status write_all(const char *path, const aq_store_writer_options *o, aq_error *err) { return sample_write(path, g_samples, N_SAMPLES, o, err); }

static int64_t g_steps_left = -1;
static int64_t g_steps = 24; /* of a whole run, once it is known */
static void die_at_last_step(const char *step) {
    (void)step;
    if (g_steps_left-- == 0) kill(getpid(), SIGKILL);
}

/* Runs write_all in a child that is killed after `steps` steps (never when negative). Returns the status, or -1 when it was killed. */
static int run_child(const char *path, const aq_store_writer_options *o, int64_t steps) {
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        aq_error err;
        g_steps_left = steps;
        aq_store_step = steps >= 0 ? die_at_last_step : NULL;
        _exit((int)write_all(path, o, &err));
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* The target is absent, or complete: never half of it. */
static void expect_nothing_or_whole(const char *path) {
    aq_store *store;
    aq_error err;
    if (!aq_path_exists(path)) return;
    assert_int_equal(aq_store_open(&store, path, &err), AQ_OK);
    assert_int_equal(aq_store_n_tensors(store), N_SAMPLES);
    aq_store_close(store);
}

static void FA02_killed_at_every_step_boundary_ends_with_the_same_bytes(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *reference = sample_path(dir, "reference");
    aq_store_writer_options o = options_for("f");
    assert_int_equal(run_child(reference, &o, -1), 0);
    int64_t n = 0;
    for (;; n++) {
        char *work = sample_dir_create(), *path = sample_path(work, "out");
        int killed = run_child(path, &o, n);
        expect_nothing_or_whole(path);
        bool complete = aq_path_exists(path);
        int status = killed == -1 ? run_child(path, &o, -1) : killed;
        if (complete && killed == -1) /* it was whole already: the second run tidies up and says that the output exists */
            assert_int_equal(status, AQ_ERR_IO);
        else
            assert_int_equal(status, AQ_OK);
        assert_true(sample_same_folders(reference, path));
        assert_int_equal(sample_count_names(work), 1);
        aq_free(path);
        sample_dir_remove(work);
        if (killed != -1) break; /* more steps than a run has */
    }
    assert_true(n > 30);
    g_steps = n;
    aq_free(reference);
    sample_dir_remove(dir);
}

/* A run that is killed again and again still gets there. */
static void FA02_killed_many_times_in_a_row_ends_with_the_same_bytes(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *reference = sample_path(dir, "reference"), *path = sample_path(dir, "out");
    aq_store_writer_options o = options_for("f");
    assert_int_equal(run_child(reference, &o, -1), 0);
    int runs = 0;
    while (run_child(path, &o, 9) == -1) assert_true(++runs < 100);
    assert_true(runs > 1);
    assert_true(sample_same_folders(reference, path));
    assert_int_equal(sample_count_names(dir), 2);
    aq_free(path);
    aq_free(reference);
    sample_dir_remove(dir);
}

static void FA02_killed_at_random_moments_ends_with_the_same_bytes(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *reference = sample_path(dir, "reference");
    aq_store_writer_options o = options_for("f");
    double start = aq_now_s();
    assert_int_equal(run_child(reference, &o, -1), 0);
    double duration = aq_now_s() - start; /* kills are spread over a run, however long it takes here */
    uint32_t seed = 1;
    for (int i = 0; i < 40; i++) {
        char *work = sample_dir_create(), *path = sample_path(work, "out");
        fflush(NULL);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            aq_error err;
            _exit((int)write_all(path, &o, &err));
        }
        seed = seed * 1664525u + 1013904223u;
        usleep((useconds_t)(duration * 1.2e6 * (seed >> 16) / 65536));
        kill(pid, SIGKILL);
        int status;
        waitpid(pid, &status, 0);
        expect_nothing_or_whole(path);
        int again = run_child(path, &o, -1);
        assert_true(again == AQ_OK || (again == AQ_ERR_IO && aq_path_exists(path)));
        assert_true(sample_same_folders(reference, path));
        assert_int_equal(sample_count_names(work), 1);
        aq_free(path);
        sample_dir_remove(work);
    }
    aq_free(reference);
    sample_dir_remove(dir);
}

/* Replacing: at every moment there is the old model or the new one, whole. */
static void FA02_killed_while_replacing_leaves_old_or_new(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *reference = sample_path(dir, "reference"), *old = sample_path(dir, "old");
    aq_store_writer_options o = options_for("f"), first = options_for("old");
    first.config_json = "{\"old\":true}";
    o.overwrite = true;
    assert_int_equal(run_child(reference, &o, -1), 0);
    assert_int_equal(run_child(old, &first, -1), 0);
    for (int64_t n = g_steps - 10;; n++) { /* the end of the run: naming, checking, exchanging */
        char *work = sample_dir_create(), *path = sample_path(work, "out");
        assert_int_equal(run_child(path, &first, -1), 0);
        int killed = run_child(path, &o, n);
        assert_true(sample_same_folders(path, old) || sample_same_folders(path, reference));
        if (killed == -1) assert_int_equal(run_child(path, &o, -1), 0);
        assert_true(sample_same_folders(reference, path));
        assert_int_equal(sample_count_names(work), 1);
        aq_free(path);
        sample_dir_remove(work);
        if (killed != -1) break;
    }
    aq_free(old);
    aq_free(reference);
    sample_dir_remove(dir);
}

/* Leaves the state of a run that was killed at step n. */
static void leave_state(const char *path, const aq_store_writer_options *o, int64_t n) { assert_int_equal(run_child(path, o, n), -1); }

/* The only leftover folder beside `path`. */
static char *leftover(const char *dir) {
    aq_names names = {0};
    char *found = NULL;
    assert_int_equal(aq_list_dir(&names, dir, 100, NULL), AQ_OK);
    for (size_t i = 0; i < names.n_names; i++)
        if (strstr(names.names[i], ".partial-")) found = sample_path(dir, names.names[i]);
    aq_names_free(&names);
    assert_non_null(found);
    return found;
}

static void what_is_done_is_told_to_the_next_run(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options o = options_for("f");
    aq_store_writer *w;
    aq_store_record r;
    aq_error err;
    leave_state(path, &o, 24);
    assert_int_equal(aq_store_writer_create(&w, path, &o, &err), AQ_OK);
    uint64_t n = aq_store_writer_n_done(w);
    assert_true(n > 2 && n < N_SAMPLES);
    for (uint64_t i = 0; i < n; i++) {
        assert_true(aq_store_writer_done(w, i, &r));
        const aq_store_record *s = &g_samples[i].record;
        assert_string_equal(r.name, s->name);
        assert_string_equal(r.quant_type, s->quant_type);
        assert_string_equal(r.quality.method, s->quality.method);
        assert_int_equal(r.quantized, s->quantized);
        assert_int_equal(r.spec.bits, s->spec.bits);
        assert_int_equal(r.spec.group_size, s->spec.group_size);
        assert_int_equal(r.row_count, s->row_count);
        assert_true(isnan(s->quality.cosine) ? isnan(r.quality.cosine) : r.quality.cosine == s->quality.cosine);
        assert_null(r.data);
    }
    assert_false(aq_store_writer_done(w, n, &r));
    /* Cancelled again: the state stays. */
    aq_store_writer_abort(w, true);
    assert_int_equal(aq_store_writer_create(&w, path, &o, &err), AQ_OK);
    assert_int_equal(aq_store_writer_n_done(w), n);
    aq_store_writer_abort(w, false);
    assert_int_equal(sample_count_names(dir), 0);
    aq_free(path);
    sample_dir_remove(dir);
}

static void a_run_cancelled_before_its_first_checkpoint_leaves_nothing(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options o = sample_options("f");
    aq_store_writer *w;
    aq_error err;
    assert_int_equal(aq_store_writer_create(&w, path, &o, &err), AQ_OK);
    assert_int_equal(aq_store_writer_add(w, &g_samples[1].record, &err), AQ_OK);
    char *work = leftover(dir);
    struct stat st;
    assert_int_equal(stat(work, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    aq_store_writer_abort(w, true);
    assert_int_equal(sample_count_names(dir), 0);
    aq_free(work);
    aq_free(path);
    sample_dir_remove(dir);
}

static void FA04_missing_and_unusable_folders_are_refused_before_any_work(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "a/b/out"), *file = sample_path(dir, "file"), *below = sample_path(dir, "file/out");
    aq_store_writer_options o = sample_options("f");
    aq_store_writer *w;
    aq_error err;
    assert_int_equal(aq_store_writer_create(&w, path, &o, &err), AQ_ERR_IO);
    assert_non_null(strstr(err.hint, "--mkdir"));
    o.make_parents = true;
    assert_int_equal(aq_store_writer_create(&w, path, &o, &err), AQ_OK);
    aq_store_writer_abort(w, false);
    sample_write_file(file, "x", 1);
    assert_int_equal(aq_store_writer_create(&w, below, &o, &err), AQ_ERR_IO);
    /* Far too little space. */
    o.predicted_bytes = UINT64_C(1) << 60;
    assert_int_equal(aq_store_writer_create(&w, path, &o, &err), AQ_ERR_IO);
    assert_non_null(strstr(err.message, "free"));
    aq_free(below);
    aq_free(file);
    aq_free(path);
    sample_dir_remove(dir);
}

static void FA05_existing_output_is_kept_without_overwrite_and_replaced_with_it(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out"), *other = sample_path(dir, "other"), *inside = sample_path(dir, "other/precious");
    aq_store_writer_options o = sample_options("f");
    aq_error err;
    assert_int_equal(sample_write(path, g_samples, 2, &o, &err), AQ_OK);
    assert_int_equal(sample_write(path, g_samples, 3, &o, &err), AQ_ERR_IO);
    assert_non_null(strstr(err.message, "exists"));
    assert_non_null(strstr(err.hint, "--overwrite"));
    o.overwrite = true;
    assert_int_equal(sample_write(path, g_samples, 3, &o, &err), AQ_OK);
    aq_store *store;
    assert_int_equal(aq_store_open(&store, path, &err), AQ_OK);
    assert_int_equal(aq_store_n_tensors(store), 3);
    aq_store_close(store);
    assert_int_equal(sample_count_names(dir), 1);
    /* A folder that is no container is never replaced, not even with --overwrite; nor is a file. */
    assert_int_equal(aq_make_dirs(other, &err), AQ_OK);
    sample_write_file(inside, "x", 1);
    assert_int_equal(sample_write(other, g_samples, 1, &o, &err), AQ_ERR_IO);
    assert_int_equal(sample_write(inside, g_samples, 1, &o, &err), AQ_ERR_IO);
    assert_true(aq_path_exists(inside));
    aq_free(inside);
    aq_free(other);
    aq_free(path);
    sample_dir_remove(dir);
}

static void FA11_second_run_on_the_same_output_is_refused_while_the_first_lives(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options o = sample_options("f");
    aq_store_writer *w, *second;
    aq_error err;
    assert_int_equal(aq_store_writer_create(&w, path, &o, &err), AQ_OK);
    assert_int_equal(aq_store_writer_create(&second, path, &o, &err), AQ_ERR_IO);
    assert_non_null(strstr(err.message, "another run"));
    assert_int_equal(run_child(path, &o, -1), AQ_ERR_IO);
    o.restart = true; /* not even then */
    assert_int_equal(aq_store_writer_create(&second, path, &o, &err), AQ_ERR_IO);
    assert_int_equal(aq_store_writer_add(w, &g_samples[1].record, &err), AQ_OK);
    assert_int_equal(aq_store_writer_finish(w, "{}", &err), AQ_OK);
    aq_free(path);
    sample_dir_remove(dir);
}

/* A lock of a machine that is not this one cannot be judged from here. */
static void FA11_lock_of_another_host_is_respected(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options o = options_for("f");
    leave_state(path, &o, 24);
    char *work = leftover(dir), *lock = sample_path(work, "lock");
    static const char text[] = "{\"pid\":1,\"host\":\"elsewhere.example\",\"boot_id\":\"b\"}";
    sample_write_file(lock, text, sizeof text - 1);
    aq_error err;
    assert_int_equal(write_all(path, &o, &err), AQ_ERR_IO);
    assert_non_null(strstr(err.message, "elsewhere.example"));
    aq_free(lock);
    aq_free(work);
    aq_free(path);
    sample_dir_remove(dir);
}

static void FA14_state_of_other_options_is_refused_and_restart_discards_it(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options o = options_for("f");
    aq_error err;
    leave_state(path, &o, 24);
    o.fingerprint = "another";
    assert_int_equal(write_all(path, &o, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.hint, "--restart"));
    assert_int_equal(sample_count_names(dir), 1); /* the state is still there */
    o.restart = true;
    assert_int_equal(write_all(path, &o, &err), AQ_OK);
    assert_int_equal(sample_count_names(dir), 1);
    aq_free(path);
    sample_dir_remove(dir);
}

/* Every byte of the journal flipped, one at a time: refused with a reason, or (the last record, whose loss only costs work) the same bytes come out. */
static void FA14_damaged_journal_is_refused_or_does_no_harm(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out"), *reference = sample_path(dir, "reference");
    aq_store_writer_options o = options_for("f");
    aq_error err;
    assert_int_equal(write_all(reference, &o, &err), AQ_OK);
    leave_state(path, &o, 24);
    char *work = leftover(dir), *journal = sample_path(work, "journal");
    uint64_t size;
    uint8_t *bytes = sample_read_file(journal, &size);
    int refused = 0;
    assert_true(size > 2000);
    for (uint64_t at = 0; at < size; at += at < 200 ? 1 : 487) {
        aq_store_writer *w;
        bytes[at] ^= 0x10;
        sample_write_file(journal, bytes, size);
        bytes[at] ^= 0x10;
        aq_status status = aq_store_writer_create(&w, path, &o, &err);
        if (status == AQ_OK) { /* fewer records are known; what is known is right */
            assert_true(aq_store_writer_n_done(w) < N_SAMPLES);
            aq_store_writer_abort(w, true);
            break; /* the folder has changed hands and shape */
        }
        assert_int_equal(status, AQ_ERR_USAGE);
        assert_non_null(strstr(err.message, "damaged"));
        assert_non_null(strstr(err.hint, "--restart"));
        refused++;
    }
    assert_true(refused > 200);
    aq_free(bytes);
    aq_free(journal);
    aq_free(work);
    /* Whatever the last attempt left is continued or started anew, and ends as it should. */
    assert_int_equal(write_all(path, &o, &err), AQ_OK);
    assert_true(sample_same_folders(reference, path));
    aq_free(reference);
    aq_free(path);
    sample_dir_remove(dir);
}

static void FA14_missing_data_of_the_interrupted_run_are_refused(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options o = options_for("f");
    aq_error err;
    leave_state(path, &o, 24);
    char *work = leftover(dir), *part = sample_path(work, "out/part-00001.parquet");
    assert_int_equal(truncate(part, 1000), 0);
    assert_int_equal(unlink(part), 0);
    assert_int_equal(write_all(path, &o, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.hint, "--restart"));
    o.restart = true;
    assert_int_equal(write_all(path, &o, &err), AQ_OK);
    aq_free(part);
    aq_free(work);
    aq_free(path);
    sample_dir_remove(dir);
}

static bool never(void *user) {
    (void)user;
    return false;
}

static void cancelled_verification_keeps_the_work(void **state) {
    (void)state;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options o = options_for("f");
    aq_error err;
    o.keep_going = never;
    assert_int_equal(write_all(path, &o, &err), AQ_ERR_INTERRUPTED);
    assert_false(aq_path_exists(path));
    o.keep_going = NULL;
    aq_store_writer *w;
    assert_int_equal(aq_store_writer_create(&w, path, &o, &err), AQ_OK);
    assert_int_equal(aq_store_writer_n_done(w), N_SAMPLES);
    assert_int_equal(aq_store_writer_finish(w, "{}", &err), AQ_OK);
    expect_nothing_or_whole(path);
    aq_free(path);
    sample_dir_remove(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(FA02_killed_at_every_step_boundary_ends_with_the_same_bytes),
        cmocka_unit_test(FA02_killed_many_times_in_a_row_ends_with_the_same_bytes),
        cmocka_unit_test(FA02_killed_at_random_moments_ends_with_the_same_bytes),
        cmocka_unit_test(FA02_killed_while_replacing_leaves_old_or_new),
        cmocka_unit_test(what_is_done_is_told_to_the_next_run),
        cmocka_unit_test(a_run_cancelled_before_its_first_checkpoint_leaves_nothing),
        cmocka_unit_test(FA04_missing_and_unusable_folders_are_refused_before_any_work),
        cmocka_unit_test(FA05_existing_output_is_kept_without_overwrite_and_replaced_with_it),
        cmocka_unit_test(FA11_second_run_on_the_same_output_is_refused_while_the_first_lives),
        cmocka_unit_test(FA11_lock_of_another_host_is_respected),
        cmocka_unit_test(FA14_state_of_other_options_is_refused_and_restart_discards_it),
        cmocka_unit_test(FA14_damaged_journal_is_refused_or_does_no_harm),
        cmocka_unit_test(FA14_missing_data_of_the_interrupted_run_are_refused),
        cmocka_unit_test(cancelled_verification_keeps_the_work),
    };
    return cmocka_run_group_tests(tests, make_samples, free_samples);
}
