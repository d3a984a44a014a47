/* Regular expressions in bounded time (see regex.h).
 *
 * The pattern becomes a program for a machine that follows all alternatives at once (K. Thompson, "Regular expression search algorithm", CACM 1968;
 * R. Cox, "Regular Expression Matching: the Virtual Machine Approach", 2009): per character of the text each instruction runs at most once, whatever the
 * pattern. Jumps are relative, so that a block of code can be moved behind a new instruction and copied for {m,n}.
 */
#include "pipeline/regex.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"

enum { MAX_PATTERN = 1024, MAX_CODE = 4096, MAX_DEPTH = 64, MAX_REPEAT = 255 };

typedef enum op { OP_RANGES, OP_RANGE, OP_SPLIT, OP_JUMP, OP_BEGIN, OP_END, OP_WORD_EDGE, OP_NO_WORD_EDGE, OP_MATCH } op;

/* OP_RANGES: one character in one of the y OP_RANGE [x, y] instructions that follow, or in none of them when x is 1. OP_SPLIT: to +x and to +y. OP_JUMP: to +x.
 */
typedef struct instruction {
    op op;
    int32_t x, y;
} instruction;

struct aq_regex {
    int n_code;
    int n_current, n_next, n_stack;
    instruction code[MAX_CODE];
    int current[MAX_CODE], next[MAX_CODE], stack[2 * MAX_CODE];
    uint32_t seen[MAX_CODE]; /* step at which an instruction was last reached */
};

/* ---- compiler ---- */

typedef struct compiler {
    aq_regex *regex;
    const char *pattern, *at;
    int depth;
    const char *problem; /* first error, NULL: none */
} compiler;

static bool fail(compiler *c, const char *problem) {
    if (!c->problem) c->problem = problem;
    return false;
}

/* Makes room for one instruction at `where`; what stood there moves behind it. */
static bool insert(compiler *c, int where, instruction i) {
    aq_regex *r = c->regex;
    if (r->n_code == MAX_CODE) return fail(c, "the expression is too large");
    memmove(r->code + where + 1, r->code + where, (size_t)(r->n_code - where) * sizeof i);
    r->code[where] = i;
    r->n_code++;
    return true;
}

static bool emit(compiler *c, op kind, int32_t x, int32_t y) { return insert(c, c->regex->n_code, (instruction){kind, x, y}); }

static bool emit_char(compiler *c, int32_t ch) { return emit(c, OP_RANGES, 0, 1) && emit(c, OP_RANGE, ch, ch); }

/* One character of the pattern; bytes that are not UTF-8 stand for themselves. */
static int32_t next_char(const char **at) {
    const unsigned char *p = (const unsigned char *)*at;
    int n = p[0] < 0xC0 ? 1 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    int32_t ch = n == 1 ? p[0] : p[0] & (0x7F >> n);
    for (int i = 1; i < n; i++) {
        if ((p[i] & 0xC0) != 0x80) {
            *at += 1;
            return p[0];
        }
        ch = ch << 6 | (p[i] & 0x3F);
    }
    *at += n;
    return ch;
}

static bool is_word(int32_t ch) { return (ch >= '0' && ch <= '9') || (ch >= 'a' && ch <= 'z') || (ch >= 'A' && ch <= 'Z') || ch == '_'; }

/* Ranges of \d \w \s and, as what lies between those, of \D \W \S. 0: another letter. */
static int class_ranges(char letter, int32_t out[8][2]) {
    static const int32_t digit[][2] = {{'0', '9'}}, word[][2] = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}}, space[][2] = {{9, 13}, {' ', ' '}};
    const int32_t(*set)[2] = letter == 'd' || letter == 'D' ? digit : letter == 'w' || letter == 'W' ? word : letter == 's' || letter == 'S' ? space : NULL;
    int n = set == digit ? 1 : set == word ? 4 : 2;
    if (!set) return 0;
    if (letter >= 'a') {
        memcpy(out, set, (size_t)n * sizeof *out);
        return n;
    }
    for (int i = 0; i <= n; i++) {
        out[i][0] = i == 0 ? 0 : set[i - 1][1] + 1;
        out[i][1] = i == n ? 0x10FFFF : set[i][0] - 1;
    }
    return n + 1;
}

/* The character that \letter stands for; -1: none. Letters and digits without a meaning are refused, so that a typing error does not match itself. */
static int32_t escaped_char(compiler *c, char letter) {
    if (letter == 'n') return '\n';
    if (letter == 't') return '\t';
    if (letter >= '1' && letter <= '9') {
        fail(c, "back-references are not allowed");
        return -1;
    }
    if (!letter || is_word(letter) || (unsigned char)letter >= 0x80) {
        fail(c, "unknown escape");
        return -1;
    }
    return letter;
}

/* One end of a range in brackets, or a class (then n_ranges > 0). */
static int32_t bracket_item(compiler *c, int32_t ranges[8][2], int *n_ranges) {
    *n_ranges = 0;
    if (*c->at != '\\') return next_char(&c->at);
    c->at++;
    char letter = *c->at;
    *n_ranges = class_ranges(letter, ranges);
    if (*n_ranges > 0) {
        c->at++;
        return 0;
    }
    int32_t ch = escaped_char(c, letter);
    if (ch >= 0) c->at++;
    return ch;
}

/* Behind '['. */
static bool compile_brackets(compiler *c) {
    int start = c->regex->n_code, n = 0;
    bool negated = *c->at == '^';
    if (negated) c->at++;
    if (!emit(c, OP_RANGES, negated, 0)) return false;
    for (bool first = true; *c->at != ']' || first; first = false) {
        if (!*c->at) return fail(c, "a bracket is not closed");
        int32_t ranges[8][2], low = 0, high = 0;
        int n_ranges;
        low = high = bracket_item(c, ranges, &n_ranges);
        if (low < 0) return false;
        if (n_ranges == 0 && c->at[0] == '-' && c->at[1] && c->at[1] != ']') {
            int32_t unused[8][2];
            int n_unused;
            c->at++;
            high = bracket_item(c, unused, &n_unused);
            if (high < 0) return false;
            if (n_unused > 0 || high < low) return fail(c, "a range in brackets runs backwards");
        }
        for (int i = 0; i < n_ranges; i++, n++)
            if (!emit(c, OP_RANGE, ranges[i][0], ranges[i][1])) return false;
        if (n_ranges == 0 && n++ >= 0 && !emit(c, OP_RANGE, low, high)) return false;
    }
    c->at++;
    c->regex->code[start].y = n;
    return true;
}

/* Behind '\'. */
static bool compile_escape(compiler *c) {
    int32_t ranges[8][2];
    char letter = *c->at;
    int n = class_ranges(letter, ranges);
    if (n > 0) {
        c->at++;
        if (!emit(c, OP_RANGES, 0, n)) return false;
        for (int i = 0; i < n; i++)
            if (!emit(c, OP_RANGE, ranges[i][0], ranges[i][1])) return false;
        return true;
    }
    if (letter == 'b' || letter == 'B') {
        c->at++;
        return emit(c, letter == 'b' ? OP_WORD_EDGE : OP_NO_WORD_EDGE, 0, 0);
    }
    int32_t ch = escaped_char(c, letter);
    if (ch < 0) return false;
    c->at++;
    return emit_char(c, ch);
}

static bool compile_alternatives(compiler *c);

static bool compile_atom(compiler *c) {
    switch (*c->at) {
    case '(':
        c->at++;
        if (*c->at == '?') {
            if (c->at[1] != ':') return fail(c, "of the (?…) groups only (?:…) is allowed");
            c->at += 2;
        }
        if (++c->depth > MAX_DEPTH) return fail(c, "groups are nested deeper than 64 levels");
        if (!compile_alternatives(c)) return false;
        if (*c->at != ')') return fail(c, "a group is not closed");
        c->at++;
        c->depth--;
        return true;
    case '[': c->at++; return compile_brackets(c);
    case '\\': c->at++; return compile_escape(c);
    case '.': c->at++; return emit(c, OP_RANGES, 1, 1) && emit(c, OP_RANGE, '\n', '\n');
    case '^': c->at++; return emit(c, OP_BEGIN, 0, 0);
    case '$': c->at++; return emit(c, OP_END, 0, 0);
    case '*':
    case '+':
    case '?':
    case '{': return fail(c, "a quantifier has nothing to repeat");
    default: return emit_char(c, next_char(&c->at));
    }
}

/* A count of at most MAX_REPEAT; -1: none there. */
static int read_count(compiler *c) {
    if (*c->at < '0' || *c->at > '9') return -1;
    int n = 0;
    for (; *c->at >= '0' && *c->at <= '9'; c->at++) {
        n = n * 10 + (*c->at - '0');
        if (n > MAX_REPEAT) {
            fail(c, "a repetition is larger than 255");
            return -1;
        }
    }
    return n;
}

/* Reads a quantifier; most = -1: no end. False when there is none or it is wrong. */
static bool read_quantifier(compiler *c, int *least, int *most) {
    switch (*c->at) {
    case '*': *least = 0, *most = -1; break;
    case '+': *least = 1, *most = -1; break;
    case '?': *least = 0, *most = 1; break;
    case '{':
        c->at++;
        *least = *most = read_count(c);
        if (*least >= 0 && *c->at == ',') {
            c->at++;
            *most = read_count(c);
        }
        if (*least < 0 || *c->at != '}' || (*most >= 0 && *most < *least)) return fail(c, "a repetition must be {m}, {m,} or {m,n}");
        break;
    default: return false;
    }
    c->at++;
    if (*c->at == '?') c->at++; /* shortest or longest is the same question here */
    if (*c->at == '*' || *c->at == '+' || *c->at == '?' || *c->at == '{') return fail(c, "two quantifiers follow each other");
    return true;
}

/* Appends a copy of the block [start, start + n). */
static bool copy_block(compiler *c, int start, int n) {
    aq_regex *r = c->regex;
    if (n > MAX_CODE - r->n_code) return fail(c, "the expression is too large");
    memmove(r->code + r->n_code, r->code + start, (size_t)n * sizeof *r->code);
    r->n_code += n;
    return true;
}

/* Turns the block from `start` to the end of the code into its repetition: least copies, then optional ones, or a loop. */
static bool repeat(compiler *c, int start, int least, int most) {
    int n = c->regex->n_code - start, last = start;
    if (most == 0) {
        c->regex->n_code = start;
        return true;
    }
    for (int i = 1; i < least; i++) {
        last = c->regex->n_code;
        if (!copy_block(c, start, n)) return false;
    }
    if (most < 0 && least > 0) return emit(c, OP_SPLIT, last - c->regex->n_code, 1);                           /* x+ : back, or on */
    if (most < 0) return insert(c, start, (instruction){OP_SPLIT, 1, n + 2}) && emit(c, OP_JUMP, -(n + 1), 0); /* x* */
    if (least == 0) {
        if (!insert(c, start, (instruction){OP_SPLIT, 1, n + 1})) return false;
        for (int i = 1; i < most; i++)
            if (!copy_block(c, start, n + 1)) return false;
        return true;
    }
    for (int i = least; i < most; i++)
        if (!emit(c, OP_SPLIT, 1, n + 1) || !copy_block(c, start, n)) return false;
    return true;
}

static bool compile_sequence(compiler *c) {
    while (*c->at && *c->at != '|' && *c->at != ')') {
        int start = c->regex->n_code, least, most;
        if (!compile_atom(c)) return false;
        if (read_quantifier(c, &least, &most) && !repeat(c, start, least, most)) return false;
        if (c->problem) return false;
    }
    return true;
}

/* a|b|c: split before each but the last, a jump to the end behind each but the last. The jumps are chained through x until the end is known. */
static bool compile_alternatives(compiler *c) {
    aq_regex *r = c->regex;
    int chain = -1;
    for (;;) {
        int start = r->n_code;
        if (!compile_sequence(c)) return false;
        if (*c->at != '|') break;
        c->at++;
        if (!insert(c, start, (instruction){OP_SPLIT, 1, r->n_code - start + 2}) || !emit(c, OP_JUMP, chain, 0)) return false;
        chain = r->n_code - 1;
    }
    while (chain >= 0) {
        int before = r->code[chain].x;
        r->code[chain].x = r->n_code - chain;
        chain = before;
    }
    return true;
}

aq_status aq_regex_create(aq_regex **out, const char *pattern, aq_error *err) {
    *out = NULL;
    char shown[128];
    aq_escape(shown, sizeof shown, pattern, strlen(pattern));
    if (strlen(pattern) > MAX_PATTERN) return aq_fail(err, AQ_ERR_USAGE, "Invalid pattern \"%s…\": longer than 1,024 bytes", shown);
    aq_regex *r = aq_calloc(1, sizeof *r);
    if (!r) return aq_fail_memory(err, sizeof *r, "a pattern");
    compiler c = {r, pattern, pattern, 0, NULL};
    bool ok = compile_alternatives(&c);
    if (ok && *c.at == ')') ok = fail(&c, "a group is closed that is not open");
    if (ok) ok = emit(&c, OP_MATCH, 0, 0);
    if (ok) {
        *out = r;
        return AQ_OK;
    }
    aq_regex_destroy(r);
    return aq_fail(err, AQ_ERR_USAGE, "Invalid pattern \"%s\": %s, at byte %d", shown, c.problem, (int)(c.at - pattern) + 1);
}

void aq_regex_destroy(aq_regex *regex) { aq_free(regex); }

/* ---- machine ---- */

/* Follows jumps and tests from `pc` and puts each reached RANGES into next. True when the match is reached. `before` and `after` are the characters beside
 * the position, -1 at the ends. */
static bool follow(aq_regex *r, int pc, uint32_t step, int32_t before, int32_t after) {
    r->n_stack = 0;
    r->stack[r->n_stack++] = pc;
    while (r->n_stack > 0) {
        pc = r->stack[--r->n_stack];
        if (r->seen[pc] == step) continue;
        r->seen[pc] = step;
        const instruction *i = &r->code[pc];
        bool edge = is_word(before) != is_word(after);
        switch (i->op) {
        case OP_MATCH: return true;
        case OP_RANGES: r->next[r->n_next++] = pc; break;
        case OP_SPLIT:
            r->stack[r->n_stack++] = pc + i->y;
            r->stack[r->n_stack++] = pc + i->x;
            break;
        case OP_JUMP: r->stack[r->n_stack++] = pc + i->x; break;
        case OP_BEGIN:
            if (before < 0) r->stack[r->n_stack++] = pc + 1;
            break;
        case OP_END:
            if (after < 0) r->stack[r->n_stack++] = pc + 1;
            break;
        case OP_WORD_EDGE:
            if (edge) r->stack[r->n_stack++] = pc + 1;
            break;
        case OP_NO_WORD_EDGE:
            if (!edge) r->stack[r->n_stack++] = pc + 1;
            break;
        case OP_RANGE: break;
        }
    }
    return false;
}

static bool in_ranges(const instruction *i, int32_t ch) {
    bool in = false;
    for (int k = 1; k <= i->y && !in; k++) in = i[k].x <= ch && ch <= i[k].y;
    return in != (i->x == 1);
}

bool aq_regex_search(aq_regex *r, const char *text) {
    memset(r->seen, 0, sizeof r->seen);
    uint32_t step = 0;
    int32_t before = -1;
    r->n_current = 0;
    for (;;) {
        const char *rest = text;
        int32_t ch = *text ? next_char(&rest) : -1;
        /* The step at a position: first those who came over the last character, then a new start here. */
        step++;
        r->n_next = 0;
        for (int k = 0; k < r->n_current; k++)
            if (follow(r, r->current[k], step, before, ch)) return true;
        if (follow(r, 0, step, before, ch)) return true;
        if (ch < 0) return false;
        /* Who takes this character goes on behind its ranges. */
        r->n_current = 0;
        for (int k = 0; k < r->n_next; k++) {
            const instruction *i = &r->code[r->next[k]];
            if (in_ranges(i, ch)) r->current[r->n_current++] = r->next[k] + i->y + 1;
        }
        before = ch;
        text = rest;
    }
}
