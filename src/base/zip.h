/* Members of a ZIP archive (an .npz file is one), stored or deflated, read from front to back. ZIP64 included; encrypted or split archives are refused.
 * Source: APPNOTE.TXT, "ZIP File Format Specification", 4.3. The archive is untrusted: every offset and size is compared with the file first. */
#ifndef AQ_BASE_ZIP_H
#define AQ_BASE_ZIP_H

#include "base/error.h"

typedef struct aq_zip_member {
    char *name;
    uint64_t offset; /* of its local header */
    uint64_t stored_bytes, size;
    uint32_t crc;
    uint16_t method; /* 0 stored, 8 deflated */
} aq_zip_member;

typedef struct aq_zip {
    const char *path; /* borrowed */
    int fd;           /* borrowed */
    uint64_t file_size;
    aq_zip_member *members;
    size_t n_members;
} aq_zip;

/* Reads the directory. aq_zip_close in any case. */
aq_status aq_zip_open(aq_zip *out, int fd, uint64_t file_size, const char *path, aq_error *err);
void aq_zip_close(aq_zip *zip);

/* Reading one member, or (aq_zip_stream_plain) a range of a file in the same way. */
typedef struct aq_zip_stream aq_zip_stream;
aq_status aq_zip_stream_open(aq_zip_stream **out, const aq_zip *zip, const aq_zip_member *member, aq_error *err);
aq_status aq_zip_stream_plain(aq_zip_stream **out, int fd, uint64_t size, const char *path, aq_error *err);
void aq_zip_stream_close(aq_zip_stream *stream);
uint64_t aq_zip_stream_left(const aq_zip_stream *stream); /* bytes that are still to be read */
/* Exactly `size` bytes; AQ_ERR_FORMAT when it ends early. With the last byte the checksum is compared. */
aq_status aq_zip_stream_read(aq_zip_stream *stream, void *out, uint64_t size, aq_error *err);

#endif
