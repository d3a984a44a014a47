/* The journal of a writing run: an append-only file of checksummed records, synced, from which an interrupted run is continued (docs/format.md).
 *
 * A checkpoint is recorded after its data are durable and holds the Parquet footer of that moment, because the next row group overwrites it in the file.
 * A record cut off at the end of the file is what a kill leaves: it is dropped. Anything else that does not fit is damage and refused (FA14). */
#ifndef AQ_STORE_JOURNAL_H
#define AQ_STORE_JOURNAL_H

#include <arrowquant/store.h>

#include "base/error.h"

/* What is remembered of a record that was written; strings are owned. */
typedef struct {
    char *name, *quant_type, *method, *fallback_from, *compared_with;
    bool quantized;
    aq_quant_spec spec;
    uint64_t row_begin, row_count;
    aq_store_quality quality; /* its strings point to the two above */
} aq_done_record;

typedef struct aq_journal {
    int fd;
    char *path;
    char *fingerprint;
    aq_done_record *done; /* in order; the first n_durable are covered by a checkpoint */
    uint64_t n_done, n_durable, done_cap;
    /* Last checkpoint: file (from 1; 0 before the first), whether it is complete, and where its footer begins. */
    uint32_t file_index;
    bool file_closed;
    uint64_t data_end, file_bytes, row_groups; /* the latter two: the writer's counts at that moment */
    uint8_t *footer;
    uint64_t footer_size;
    char final_sha256[65]; /* of metadata.json, once the rename is due; else "" */
} aq_journal;

/* Tests only: called at each boundary between two steps of a writing run, so that a test can end the process there. */
extern void (*aq_store_step)(const char *step);

/* Starts a journal for a new run. */
aq_status aq_journal_create(aq_journal *journal, const char *path, const char *fingerprint, aq_error *err);
/* Reads a journal and opens it for appending. *empty: there is none, or not even its first record is complete. */
aq_status aq_journal_open(aq_journal *journal, const char *path, bool *empty, aq_error *err);
void aq_journal_close(aq_journal *journal);

/* Remembers a record; it becomes durable with the next checkpoint. */
aq_status aq_journal_remember(aq_journal *journal, const aq_store_record *record, aq_error *err);
/* Records that `file_index` is durable up to `data_end` plus this footer. Takes the footer. */
aq_status aq_journal_checkpoint(aq_journal *journal, uint32_t file_index, bool file_closed, uint64_t data_end, uint64_t file_bytes, uint64_t row_groups,
                                uint8_t *footer, uint64_t footer_size, aq_error *err);
/* Records that everything is verified and will be renamed. */
aq_status aq_journal_final(aq_journal *journal, const char sha256[65], aq_error *err);

#endif
