/* Names that a case-insensitive file system would take for one (IX06).
 *
 * Simple case folding of the alphabets that have case: ASCII, Latin-1, Latin Extended-A, Greek, Cyrillic. Names are folded into one buffer (folding here
 * never makes a name longer) and put into a table.
 */
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "model/internal.h"

static uint32_t fold(uint32_t c) {
    if (c >= 'A' && c <= 'Z') return c + 32;
    if ((c >= 0xC0 && c <= 0xDE && c != 0xD7) || (c >= 0x391 && c <= 0x3A9) || (c >= 0x410 && c <= 0x42F)) return c + 32;
    if (c >= 0x400 && c <= 0x40F) return c + 80;
    if (c == 0x178) return 0xFF;
    if ((c >= 0x139 && c <= 0x148) || (c >= 0x179 && c <= 0x17E)) return c + (c & 1); /* pairs of odd capital, even small letter */
    if (c >= 0x100 && c <= 0x177 && c != 0x130 && c != 0x131 && c != 0x138) return c | 1;
    return c;
}

/* Appends the folded name and its NUL at `out`; returns the end. All folds stay within their UTF-8 length: two bytes or one. */
static char *fold_name(char *out, const char *name) {
    for (size_t n = strlen(name), i = 0; i < n;) {
        uint32_t code = 0;
        size_t len = aq_utf8_decode((const unsigned char *)name + i, n - i, &code);
        uint32_t folded = len == 1 || len == 2 ? fold(code) : code;
        if (len == 1) {
            *out++ = (char)folded;
        } else if (len == 2) {
            *out++ = (char)(0xC0 | folded >> 6);
            *out++ = (char)(0x80 | (folded & 0x3F));
        } else {
            len = len ? len : 1;
            memcpy(out, name + i, len);
            out += len;
        }
        i += len;
    }
    *out++ = 0;
    return out;
}

aq_status aq_model_case_clash(const aq_model *model, aq_error *err) {
    uint64_t size = 0;
    aq_name_list clashes = {0};
    for (size_t i = 0; i < model->n_tensors; i++) size += strlen(model->tensors[i].name) + 1;
    char *text = aq_alloc(size), *at = text;
    const char **folded = aq_calloc(model->n_tensors, sizeof *folded);
    aq_name_table table = {0};
    if (!text || !folded) {
        aq_free(text);
        aq_free(folded);
        return aq_fail_memory(err, size, "folded names");
    }
    aq_status status = aq_name_table_init(&table, folded, sizeof *folded, model->n_tensors, err);
    for (size_t i = 0; status == AQ_OK && i < model->n_tensors; i++) {
        folded[i] = at;
        at = fold_name(at, model->tensors[i].name);
        int64_t other = aq_name_table_add(&table, i);
        if (other < 0) continue;
        aq_name_list_add(&clashes, model->tensors[other].name);
        aq_name_list_add(&clashes, model->tensors[i].name);
    }
    if (status == AQ_OK && clashes.n > 0)
        status =
            aq_fail_at(err, AQ_ERR_FORMAT, model->path, NULL, "names differ only in case, which the target cannot tell apart: %s", aq_name_list_text(&clashes));
    aq_name_table_free(&table);
    aq_free(folded);
    aq_free(text);
    return status;
}
