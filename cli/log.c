/* See log.h. On a terminal progress is one line that is drawn again, at most ten times a second; elsewhere a line per 10 % or 30 s; or one JSON event a line.
 */
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/file.h"
#include "signals.h"
#include "term.h"

enum { MOST_WARNINGS = 20 };

typedef enum progress_mode { PROGRESS_NONE, PROGRESS_BAR, PROGRESS_LINES, PROGRESS_JSON } progress_mode;

static struct {
    progress_mode mode;
    bool quiet;
    int verbose;
    size_t n_warnings;
    FILE *file;
    bool bar_shown;
    double bar_time;  /* when the bar was drawn last */
    double line_time; /* when the last line was written */
    int line_tenth;   /* tenths of the job that lines have told */
    char stage[32];
    double stage_time; /* start of the stage, and the bytes done by then: the base of the speed */
    uint64_t stage_bytes;
} state;

static const char *const level_names[] = {[AQ_LOG_ERROR] = "error", [AQ_LOG_WARNING] = "warning", [AQ_LOG_INFO] = "info", [AQ_LOG_DEBUG] = "debug"};

void cli_log_write(aq_log_level level, const char *message) {
    if (!state.file) return;
    char when[32];
    time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    if (fprintf(state.file, "%s %s: %s\n", when, level_names[level], message) >= 0 && fflush(state.file) == 0) return;
    const char *why = strerror(errno);
    fclose(state.file); /* what is in it stays; the job goes on */
    state.file = NULL;
    char warning[256];
    snprintf(warning, sizeof warning, "the log ends here, as it cannot be written: %s", why);
    cli_log(AQ_LOG_WARNING, warning);
}

/* A log must not grow at the end of a model. */
static aq_status refuse_input(const cli_args *args, const char *path, aq_error *err) {
    const char *others[4] = {args->n_operands > 0 ? args->operands[0] : NULL, args->n_operands > 1 ? args->operands[1] : NULL, cli_args_value(args, "config"),
                             cli_args_value(args, "against")};
    bool input = aq_text_ends_with(path, ".safetensors") || aq_text_ends_with(path, ".parquet") || aq_text_ends_with(path, ".gguf");
    for (size_t i = 0; i < 4; i++) input = input || (others[i] && aq_path_same(others[i], path));
    return input ? aq_fail_at(err, AQ_ERR_USAGE, path, NULL, "--log must not name a model or another input") : AQ_OK;
}

static aq_status open_log(const cli_args *args, const char *path, aq_error *err) {
    aq_status status = refuse_input(args, path, err);
    if (status) return status;
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return aq_fail_io(err, errno, path, "cannot write the log");
    state.file = fdopen(fd, "a");
    if (!state.file) {
        close(fd);
        return aq_fail_memory(err, BUFSIZ, "the log");
    }
    char line[256];
    snprintf(line, sizeof line, "arrowquant %s %s", aq_version(), args->command ? args->command->name : "");
    cli_log_write(AQ_LOG_INFO, line);
    return AQ_OK;
}

aq_status cli_log_start(const cli_args *args, aq_error *err) {
    const char *when = cli_args_value(args, "progress"), *path = cli_args_value(args, "log"), *terminal = getenv("TERM");
    bool can_draw = isatty(STDERR_FILENO) && terminal && *terminal && strcmp(terminal, "dumb") != 0;
    state.quiet = args->quiet;
    state.verbose = args->verbose;
    if (!when || strcmp(when, "auto") == 0)
        state.mode = args->quiet ? PROGRESS_NONE : can_draw ? PROGRESS_BAR : PROGRESS_LINES;
    else if (strcmp(when, "always") == 0)
        state.mode = PROGRESS_BAR;
    else
        state.mode = strcmp(when, "json") == 0 ? PROGRESS_JSON : PROGRESS_NONE;
    return path ? open_log(args, path, err) : AQ_OK;
}

/* One event on one line of stderr; takes the reference. */
static void put_event(json_t *event) {
    char *text = event ? json_dumps(event, JSON_COMPACT) : NULL;
    if (text) fprintf(stderr, "%s\n", text);
    free(text);
    json_decref(event);
}

static void clear_bar(void) {
    if (state.bar_shown) fputs("\r\033[K", stderr);
    state.bar_shown = false;
}

void cli_log_end_progress(void) {
    clear_bar();
    if (state.mode != PROGRESS_JSON && state.verbose == 0 && state.n_warnings > MOST_WARNINGS)
        cli_print(stderr, "... %zu more warnings; -v shows all\n", state.n_warnings - MOST_WARNINGS);
    state.n_warnings = 0;
}

void cli_log(aq_log_level level, const char *message) {
    cli_log_write(level, message);
    if (state.mode == PROGRESS_JSON) {
        put_event(json_pack("{s:s,s:s,s:s}", "event", "log", "level", level_names[level], "message", message));
        return;
    }
    if ((level == AQ_LOG_INFO && state.quiet) || (level == AQ_LOG_DEBUG && state.verbose < 2)) return;
    if (level == AQ_LOG_WARNING && ++state.n_warnings > MOST_WARNINGS && state.verbose == 0) return;
    clear_bar();
    if (level <= AQ_LOG_WARNING) {
        cli_print(stderr, "%s%s:%s %s\n", cli_color_on(stderr, level == AQ_LOG_ERROR ? COLOR_RED : COLOR_YELLOW), level_names[level], cli_color_off(stderr),
                  message);
    } else {
        cli_print(stderr, "%s\n", message);
    }
}

static json_t *failure_json(const aq_error *err, int code) {
    const char *hint = err->hint[0] || err->code != AQ_ERR_INTERNAL ? err->hint : "this is a bug in arrowquant: please report it with the command line";
    return json_pack("{s:i,s:s,s:s,s:s,s:s,s:s}", "code", code, "kind", aq_status_name(err->code), "message", err->message, "file", err->file, "tensor",
                     err->tensor, "hint", hint);
}

static void print_failure(const aq_error *err, json_t *failure) {
    const char *hint = json_string_value(json_object_get(failure, "hint"));
    fflush(stdout);
    /* Being interrupted is no error: one line says how to go on. */
    if (err->code == AQ_ERR_INTERRUPTED)
        cli_print(stderr, "%s\n", err->message);
    else
        cli_print(stderr, "%serror:%s %s\n", cli_color_on(stderr, COLOR_RED), cli_color_off(stderr), err->message);
    if (hint && *hint) cli_print(stderr, "  hint: %s\n", hint);
}

int cli_report_failure(const aq_error *err, int code, bool json, json_t *report) {
    clear_bar();
    cli_log_write(AQ_LOG_ERROR, err->message);
    json_t *failure = failure_json(err, code);
    if (json) {
        json_t *root = report ? json_incref(report) : json_object();
        bool whole = root && failure && json_object_set(root, "error", failure) == 0;
        cli_print_json(whole ? root : NULL);
        json_decref(root);
    } else if (state.mode == PROGRESS_JSON && failure && json_object_set_new(failure, "event", json_string("error")) == 0) {
        put_event(json_incref(failure));
    } else {
        print_failure(err, failure);
    }
    json_decref(failure);
    return code;
}

int cli_report_error(const aq_error *err, bool json, json_t *report) { return cli_report_failure(err, (int)err->code, json, report); }

/* "  10.2 of 23.8 GB", "  512 MB of 23.8 GB" */
static int write_bytes(char *out, size_t size, uint64_t done, uint64_t total) {
    const char *part = cli_size(done), *whole = cli_size(total), *unit = strchr(part, ' '), *same = strchr(whole, ' ');
    int n = unit && same && strcmp(unit, same) == 0 ? (int)(unit - part) : (int)strlen(part);
    return snprintf(out, size, "  %.*s of %s", n, part, whole);
}

/* "43 %  336/780  10.2 of 23.8 GB  1.2 GB/s  ETA 0:41  RSS 1.1 GB" */
static void describe(char *out, size_t size, const aq_progress *p, bool narrow) {
    double seconds = p->elapsed_s - state.stage_time;
    uint64_t bytes = p->bytes_done > state.stage_bytes ? p->bytes_done - state.stage_bytes : 0;
    int n = snprintf(out, size, "%3.0f %%", floor(p->fraction * 100));
    if (p->n_total) n += snprintf(out + n, size - (size_t)n, "  %llu/%llu", (unsigned long long)p->n_done, (unsigned long long)p->n_total);
    if (p->bytes_total && !narrow) n += write_bytes(out + n, size - (size_t)n, p->bytes_done, p->bytes_total);
    if (bytes && seconds > 0.05) n += snprintf(out + n, size - (size_t)n, "  %s/s", cli_size((uint64_t)((double)bytes / seconds)));
    if (isfinite(p->eta_s) && p->fraction < 1) n += snprintf(out + n, size - (size_t)n, "  ETA %s", cli_duration(p->eta_s));
    uint64_t rss = aq_rss_bytes();
    if (rss) snprintf(out + n, size - (size_t)n, "  RSS %s", cli_size(rss));
}

static void draw_bar(const aq_progress *p) {
    enum { MOST_CELLS = 22 };
    char text[160], bar[MOST_CELLS * 4 + 1];
    int most = cli_term_width(stderr) - 1, cells = most < 98 ? 8 : MOST_CELLS;
    describe(text, sizeof text, p, most < 98);
    size_t used = 0;
    for (int i = 0; i < cells; i++) {
        bool done = i < (int)(p->fraction * cells);
        used += (size_t)snprintf(bar + used, sizeof bar - used, "%s", cli_term_utf8() ? done ? "█" : "░" : done ? "#" : "-");
    }
    char line[320];
    snprintf(line, sizeof line, "%-8s [%s] %s", p->stage, bar, text);
    /* A line longer than the terminal would wrap and could not be drawn over: leave out the end. */
    int columns = 0;
    char *end = line;
    for (; *end; end++)
        if (((unsigned char)*end & 0xC0) != 0x80 && columns++ >= most) break;
    *end = 0;
    fprintf(stderr, "\r%s\033[K", line);
    fflush(stderr);
    state.bar_shown = true;
    state.bar_time = p->elapsed_s;
}

static void write_line(const aq_progress *p) {
    char text[160];
    describe(text, sizeof text, p, false);
    cli_print(stderr, "%-8s %s\n", p->stage, text);
    state.line_tenth = (int)(p->fraction * 10 + 1e-9);
    state.line_time = p->elapsed_s;
}

static json_t *real_or_null(double value) { return isfinite(value) ? json_real(value) : json_null(); }

static void write_event(const aq_progress *p) {
    put_event(json_pack("{s:s,s:s,s:o,s:I,s:I,s:I,s:I,s:f,s:f,s:o,s:I}", "event", "progress", "stage", p->stage, "tensor",
                        p->tensor ? json_string(cli_safe(p->tensor)) : json_null(), "n_done", (json_int_t)p->n_done, "n_total", (json_int_t)p->n_total,
                        "bytes_done", (json_int_t)p->bytes_done, "bytes_total", (json_int_t)p->bytes_total, "fraction", p->fraction, "elapsed_s", p->elapsed_s,
                        "eta_s", real_or_null(p->eta_s), "rss_bytes", (json_int_t)aq_rss_bytes()));
}

static void show_detail(const aq_progress *p) {
    if (!p->detail || !p->tensor) return;
    char line[1600];
    int digits = snprintf(NULL, 0, "%llu", (unsigned long long)p->n_total);
    snprintf(line, sizeof line, "%*llu/%llu %s  %s", digits, (unsigned long long)p->n_done, (unsigned long long)p->n_total, cli_safe(p->tensor), p->detail);
    cli_log_write(AQ_LOG_INFO, line);
    if (state.verbose == 0 || state.quiet || state.mode == PROGRESS_JSON) return;
    clear_bar();
    cli_print(stderr, "%s\n", line);
}

static bool on_progress(void *user, const aq_progress *p) {
    (void)user;
    if (strncmp(state.stage, p->stage, sizeof state.stage - 1) != 0) {
        snprintf(state.stage, sizeof state.stage, "%s", p->stage);
        state.stage_time = p->elapsed_s;
        state.stage_bytes = p->bytes_done;
    }
    show_detail(p);
    switch (state.mode) {
    case PROGRESS_NONE: break;
    case PROGRESS_BAR:
        if (!state.bar_shown || p->elapsed_s - state.bar_time >= 0.1 || p->fraction >= 1) draw_bar(p);
        break;
    case PROGRESS_LINES:
        /* With -v the lines of the tensors tell enough. */
        if (state.verbose == 0 && ((int)(p->fraction * 10 + 1e-9) > state.line_tenth || p->elapsed_s - state.line_time >= 30)) write_line(p);
        break;
    case PROGRESS_JSON: write_event(p); break;
    }
    return !cli_signal_received();
}

static void on_log(void *user, aq_log_level level, const char *message) {
    (void)user;
    cli_log(level, message);
}

const aq_job_hooks *cli_job_hooks(void) {
    static const aq_job_hooks hooks = {.progress = on_progress, .log = on_log};
    return &hooks;
}
