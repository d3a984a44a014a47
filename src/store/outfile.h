/* A file that appears whole or not at all: written beside the target as `PATH.partial-<pid>` at given offsets, synced, renamed.
 * What is never written reads as zeros (padding). Positions may come in any order. */
#ifndef AQ_STORE_OUTFILE_H
#define AQ_STORE_OUTFILE_H

#include <arrowquant/base.h>

typedef struct aq_outfile aq_outfile;

/* AQ_ERR_IO: the target exists and overwrite is not set, or is a folder; no permission. */
aq_status aq_outfile_create(aq_outfile **out, const char *path, uint64_t size_bytes, bool overwrite, aq_error *err);
aq_status aq_outfile_write(aq_outfile *file, uint64_t offset, const void *data, uint64_t size_bytes, aq_error *err);
/* Syncs and renames; frees. On failure nothing is left. */
aq_status aq_outfile_finish(aq_outfile *file, aq_error *err);
void aq_outfile_abort(aq_outfile *file);

#endif
