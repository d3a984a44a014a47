/* Glob patterns over tensor names (see config.h).
 *
 * Only the last star ever has to be taken back: a shorter match of an earlier star leaves the rest of the name to the last one anyway. So one saved position
 * is enough, and the work is at most length of pattern x length of name (CF05).
 */
#include <arrowquant/config.h>

#include <string.h>

enum { MAX_PATTERN = 1024 };

/* Reads one UTF-8 character and moves on; a byte that is not UTF-8 counts as itself. */
static uint32_t next_char(const char **at) {
    const unsigned char *p = (const unsigned char *)*at;
    size_t n = p[0] < 0xC0 ? 1 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    uint32_t c = n == 1 ? p[0] : p[0] & (0x7Fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((p[i] & 0xC0) != 0x80) {
            *at += 1;
            return p[0];
        }
        c = c << 6 | (p[i] & 0x3Fu);
    }
    *at += n;
    return c;
}

/* Matches c against the brackets after '['; *at moves behind ']'. A bracket that comes first stands for itself. False in *closed: no ']'. */
static bool match_brackets(const char **at, uint32_t c, bool *closed) {
    const char *p = *at;
    bool negated = *p == '!' || *p == '^', matched = false, first = true;
    if (negated) p++;
    for (; *p && (*p != ']' || first); first = false) {
        uint32_t low = next_char(&p), high = low;
        if (p[0] == '-' && p[1] && p[1] != ']') {
            p++;
            high = next_char(&p);
        }
        matched = matched || (low <= c && c <= high);
    }
    *closed = *p == ']';
    *at = *closed ? p + 1 : p;
    return matched != negated;
}

const char *aq_glob_error(const char *pattern) {
    if (!*pattern) return "the pattern is empty";
    if (strlen(pattern) > MAX_PATTERN) return "the pattern is longer than 1,024 bytes";
    for (const char *p = pattern; *p;) {
        bool closed = true;
        if (*p++ == '[') match_brackets(&p, 0, &closed);
        if (!closed) return "a bracket is not closed";
    }
    return NULL;
}

bool aq_glob_match(const char *pattern, const char *name) {
    const char *star_pattern = NULL, *star_name = NULL;
    while (*name || *pattern) {
        const char *p = pattern, *n = name;
        bool ok = false, closed = false;
        if (*p == '*') {
            star_pattern = pattern = p + 1;
            star_name = name;
            continue;
        }
        if (*n && *p) {
            uint32_t c = next_char(&n), wanted = next_char(&p);
            ok = wanted == '?' || (wanted == '[' ? match_brackets(&p, c, &closed) && closed : wanted == c);
        }
        if (!ok) {
            if (!star_pattern || !*star_name) return false;
            next_char(&star_name); /* the star takes one character more */
            pattern = star_pattern;
            name = star_name;
            continue;
        }
        pattern = p;
        name = n;
    }
    return true;
}
