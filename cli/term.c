/* See term.h. Nothing here asks the C locale for number formats: the program never sets one, so printf writes "1.5" everywhere. */
#include "term.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/json.h"
#include "base/mem.h"
#include "base/utf8.h"

static struct {
    bool color[3]; /* by file descriptor */
    bool utf8;
    int write_errno; /* first failed write to stdout */
} term;

void cli_streams_open(void) {
    for (int fd = 0; fd < 3; fd++) {
        if (fcntl(fd, F_GETFD) != -1 || errno != EBADF) continue;
        /* The lowest free number is taken: fd itself. */
        if (open("/dev/null", fd == 0 ? O_RDONLY : O_WRONLY) < 0) return;
    }
}

static bool wants_color(int fd, const char *when) {
    if (when && strcmp(when, "always") == 0) return true;
    if (when && strcmp(when, "never") == 0) return false;
    const char *force = getenv("CLICOLOR_FORCE"), *terminal = getenv("TERM"), *none = getenv("NO_COLOR");
    if (none && *none) return false;
    if (force && *force && strcmp(force, "0") != 0) return true;
    return isatty(fd) && terminal && *terminal && strcmp(terminal, "dumb") != 0;
}

void cli_term_init(const char *color) {
    for (int fd = 1; fd < 3; fd++) term.color[fd] = wants_color(fd, color);
    const char *const names[] = {"LC_ALL", "LC_CTYPE", "LANG"};
    for (size_t i = 0; i < 3; i++) {
        const char *locale = getenv(names[i]);
        if (!locale || !*locale) continue;
        const char *dot = strchr(locale, '.');
        term.utf8 = dot && (strncasecmp(dot + 1, "UTF-8", 5) == 0 || strncasecmp(dot + 1, "utf8", 4) == 0);
        break;
    }
}

bool cli_term_utf8(void) { return term.utf8; }

int cli_term_width(FILE *stream) {
    struct winsize size;
    if (ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col >= 40) return size.ws_col;
    return 100;
}

const char *cli_color_on(FILE *stream, cli_color color) {
    static const char *const codes[] = {
        [COLOR_NONE] = "",           [COLOR_RED] = "\033[1;31m", [COLOR_GREEN] = "\033[32m",
        [COLOR_YELLOW] = "\033[33m", [COLOR_BOLD] = "\033[1m",   [COLOR_DIM] = "\033[2m",
    };
    return term.color[fileno(stream)] ? codes[color] : "";
}

const char *cli_color_off(FILE *stream) { return term.color[fileno(stream)] ? "\033[0m" : ""; }

/* Writes text as ASCII: the signs that our messages use become their usual stand-ins, any other character, as of a name, is \u{e4}. */
static void put_ascii(FILE *stream, const char *text) {
    static const struct {
        const char *utf8, *ascii;
    } stand_ins[] = {{"→", "->"}, {"×", "x"}, {"…", "..."}, {"–", "-"}, {"—", "-"}, {"≥", ">="}, {"≤", "<="}, {"≠", "!="}, {"·", "*"}, {"’", "'"}, {"²", "^2"}};
    for (const char *at = text; *at;) {
        if ((unsigned char)*at < 0x80) {
            putc(*at++, stream);
            continue;
        }
        const char *ascii = NULL;
        uint32_t code = 0;
        size_t length = aq_utf8_decode((const unsigned char *)at, strlen(at), &code);
        for (size_t i = 0; i < sizeof stand_ins / sizeof stand_ins[0]; i++)
            if (strncmp(at, stand_ins[i].utf8, strlen(stand_ins[i].utf8)) == 0) ascii = stand_ins[i].ascii;
        if (ascii)
            fputs(ascii, stream);
        else if (length)
            fprintf(stream, "\\u{%x}", (unsigned)code);
        else
            putc('?', stream);
        at += length ? length : 1;
    }
}

void cli_print(FILE *stream, const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (term.utf8) {
        vfprintf(stream, format, args);
    } else {
        char *text = NULL;
        if (vasprintf(&text, format, args) >= 0) {
            put_ascii(stream, text);
            free(text);
        }
    }
    va_end(args);
    if (stream == stdout && ferror(stdout) && !term.write_errno) term.write_errno = errno;
}

void cli_put(const char *text) {
    fputs(text, stdout);
    if (ferror(stdout) && !term.write_errno) term.write_errno = errno;
}

/* The functions that return text hand out these in turn: eight may stand in one printf. */
char *cli_buffer(size_t *size) {
    static char buffers[16][1100];
    static unsigned turn;
    *size = sizeof buffers[0];
    return buffers[turn++ % 16];
}

const char *cli_safe(const char *text) {
    size_t size;
    char *out = cli_buffer(&size);
    return aq_escape(out, size, text, strlen(text));
}

const char *cli_shell_word(const char *text) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./=:,+@%-";
    const char *safe = cli_safe(text);
    if (*safe && strspn(safe, plain) == strlen(safe)) return safe;
    size_t size, n = 0;
    char *out = cli_buffer(&size);
    out[n++] = '\'';
    for (; *safe && n + 8 < size; safe++) n += (size_t)snprintf(out + n, size - n, *safe == '\'' ? "'\\''" : "%c", *safe);
    snprintf(out + n, size - n, "'");
    return out;
}

/* Three significant digits: 6.42, 64.2, 642. */
static int write_scaled(char *out, size_t size, double value, const char *unit) {
    return snprintf(out, size, "%.*f %s", value < 9.995 ? 2 : value < 99.95 ? 1 : 0, value, unit);
}

static int write_size(char *out, size_t size, uint64_t bytes, double step, const char *const units[5]) {
    double value = (double)bytes;
    if (value < step) return snprintf(out, size, "%llu B", (unsigned long long)bytes);
    size_t unit = 0;
    value /= step;
    for (; value >= 999.5 && unit < 4; unit++) value /= step;
    return write_scaled(out, size, value, units[unit]);
}

static const char *const decimal_units[5] = {"kB", "MB", "GB", "TB", "PB"};
static const char *const binary_units[5] = {"KiB", "MiB", "GiB", "TiB", "PiB"};

const char *cli_size(uint64_t bytes) {
    size_t size;
    char *out = cli_buffer(&size);
    write_size(out, size, bytes, 1000, decimal_units);
    return out;
}

const char *cli_size_both(uint64_t bytes) {
    if (bytes < 1000) return cli_size(bytes);
    size_t size;
    char *out = cli_buffer(&size), binary[32];
    write_size(binary, sizeof binary, bytes, 1024, binary_units);
    int n = write_size(out, size, bytes, 1000, decimal_units);
    snprintf(out + n, size - (size_t)n, " (%s)", binary);
    return out;
}

const char *cli_count(uint64_t count) {
    size_t size;
    char *out = cli_buffer(&size);
    double value = (double)count;
    if (count < 10000)
        snprintf(out, size, "%llu", (unsigned long long)count);
    else if (value < 999500)
        write_scaled(out, size, value / 1e3, "k");
    else if (value < 999.5e6)
        write_scaled(out, size, value / 1e6, "M");
    else
        write_scaled(out, size, value / 1e9, "B");
    return out;
}

const char *cli_duration(double seconds) {
    size_t size;
    char *out = cli_buffer(&size);
    if (!(seconds >= 0 && seconds < 1e8)) return "?";
    long s = lround(seconds);
    if (s < 3600)
        snprintf(out, size, "%ld:%02ld", s / 60, s % 60);
    else
        snprintf(out, size, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    return out;
}

void cli_print_json(const json_t *value) {
    char *text = value ? aq_json_dump(value, true) : NULL;
    cli_put(text ? text : "{\"error\":{\"code\":7,\"kind\":\"memory\",\"message\":\"out of memory\",\"file\":\"\",\"tensor\":\"\",\"hint\":\"\"}}");
    cli_put("\n");
    free(text);
}

int cli_finish(int code) {
    if (fflush(stdout) != 0 && !term.write_errno) term.write_errno = errno;
    int reason = term.write_errno;
    if (reason == 0 || reason == EPIPE) return code; /* EPIPE: `… | head` has seen enough */
    cli_print(stderr, "%serror:%s standard output: cannot write: %s\n", cli_color_on(stderr, COLOR_RED), cli_color_off(stderr), strerror(reason));
    return code ? code : (int)AQ_ERR_IO;
}
