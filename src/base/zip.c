/* ZIP archives (see zip.h): the end record is searched from the end, the directory is read whole, members are inflated piece by piece. */
#include "base/zip.h"

#include <string.h>
#include <zlib.h>

#include "base/file.h"
#include "base/mem.h"
#include "base/size.h"

enum { END_BYTES = 22, END64_BYTES = 56, LOCATOR_BYTES = 20, ENTRY_BYTES = 46, LOCAL_BYTES = 30, MAX_COMMENT = 65535, CHUNK = 1 << 16 };
#define LIMIT_DIRECTORY (UINT64_C(16) << 20)
#define LIMIT_MEMBERS 10000

static uint32_t get16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
static uint32_t get32(const uint8_t *p) { return get16(p) | get16(p + 2) << 16; }
static uint64_t get64(const uint8_t *p) { return (uint64_t)get32(p) | (uint64_t)get32(p + 4) << 32; }

static aq_status fail(const aq_zip *z, const char *member, aq_error *err, const char *what) {
    return aq_fail_at(err, AQ_ERR_FORMAT, z->path, member, "%s", what);
}

/* ---- directory ---- */

typedef struct {
    uint64_t n, offset, size;
} directory;

/* Where the directory lies, from the record at the file's end. */
static aq_status find_directory(const aq_zip *z, directory *d, aq_error *err) {
    uint64_t tail = z->file_size < END_BYTES + MAX_COMMENT ? z->file_size : END_BYTES + MAX_COMMENT;
    uint8_t *bytes = aq_alloc(tail), *end = NULL;
    if (!bytes) return aq_fail_memory(err, tail, "the end of an archive");
    aq_status status = aq_file_pread(z->fd, bytes, tail, z->file_size - tail, z->path, err);
    for (uint64_t i = tail; status == AQ_OK && !end && i >= END_BYTES; i--)
        if (get32(bytes + i - END_BYTES) == 0x06054b50 && get16(bytes + i - 2) == tail - i) end = bytes + i - END_BYTES;
    if (status == AQ_OK && !end) status = fail(z, NULL, err, "is no whole ZIP archive: the record at its end is missing");
    if (status == AQ_OK) {
        *d = (directory){get16(end + 10), get32(end + 16), get32(end + 12)};
        bool wide = d->n == 0xFFFF || d->offset == 0xFFFFFFFF || d->size == 0xFFFFFFFF;
        uint64_t at = z->file_size - tail + (uint64_t)(end - bytes);
        uint8_t locator[LOCATOR_BYTES], end64[END64_BYTES];
        if (get16(end + 4) != 0 && !wide) status = fail(z, NULL, err, "is a part of a split archive");
        if (wide && at < LOCATOR_BYTES) status = fail(z, NULL, err, "is no whole ZIP archive");
        if (status == AQ_OK && wide) {
            status = aq_file_pread(z->fd, locator, LOCATOR_BYTES, at - LOCATOR_BYTES, z->path, err);
            uint64_t place = status == AQ_OK ? get64(locator + 8) : 0;
            if (status == AQ_OK && (get32(locator) != 0x07064b50 || place > at || at - place < END64_BYTES))
                status = fail(z, NULL, err, "its ZIP64 record is missing");
            if (status == AQ_OK) status = aq_file_pread(z->fd, end64, END64_BYTES, place, z->path, err);
            if (status == AQ_OK && get32(end64) != 0x06064b50) status = fail(z, NULL, err, "its ZIP64 record is missing");
            if (status == AQ_OK) *d = (directory){get64(end64 + 32), get64(end64 + 48), get64(end64 + 40)};
        }
    }
    aq_free(bytes);
    if (status != AQ_OK) return status;
    if (d->n > LIMIT_MEMBERS || d->size > LIMIT_DIRECTORY || d->offset > z->file_size || d->size > z->file_size - d->offset || d->size < d->n * ENTRY_BYTES)
        return fail(z, NULL, err, "its directory does not fit the file, or has more than 10000 members");
    return AQ_OK;
}

/* Sizes of 0xFFFFFFFF stand in the extra field of kind 1, in this order, only those that overflowed. */
static bool read_zip64(aq_zip_member *m, const uint8_t *extra, uint64_t n) {
    uint64_t *fields[3] = {&m->size, &m->stored_bytes, &m->offset};
    bool needed = m->size == 0xFFFFFFFF || m->stored_bytes == 0xFFFFFFFF || m->offset == 0xFFFFFFFF;
    while (needed && n >= 4) {
        uint64_t length = get16(extra + 2);
        if (length > n - 4) return false;
        if (get16(extra) == 1) {
            const uint8_t *at = extra + 4, *end = at + length;
            for (int i = 0; i < 3; i++) {
                if (*fields[i] != 0xFFFFFFFF) continue;
                if (end - at < 8) return false;
                *fields[i] = get64(at);
                at += 8;
            }
            return true;
        }
        extra += 4 + length;
        n -= 4 + length;
    }
    return !needed;
}

static aq_status read_entry(aq_zip *z, const uint8_t *p, uint64_t left, uint64_t *used, aq_error *err) {
    if (left < ENTRY_BYTES || get32(p) != 0x02014b50) return fail(z, NULL, err, "its directory is damaged");
    uint64_t n_name = get16(p + 28), n_extra = get16(p + 30), n_comment = get16(p + 32);
    *used = ENTRY_BYTES + n_name + n_extra + n_comment;
    if (*used > left || n_name == 0 || memchr(p + ENTRY_BYTES, 0, (size_t)n_name)) return fail(z, NULL, err, "its directory is damaged");
    aq_zip_member *m = &z->members[z->n_members];
    m->name = aq_alloc(n_name + 1);
    if (!m->name) return aq_fail_memory(err, n_name, "a name");
    memcpy(m->name, p + ENTRY_BYTES, (size_t)n_name);
    m->name[n_name] = 0;
    z->n_members++;
    m->method = (uint16_t)get16(p + 10);
    m->crc = get32(p + 16);
    m->stored_bytes = get32(p + 20);
    m->size = get32(p + 24);
    m->offset = get32(p + 42);
    if (get16(p + 8) & 1) return fail(z, m->name, err, "is encrypted");
    if (!read_zip64(m, p + ENTRY_BYTES + n_name, n_extra)) return fail(z, m->name, err, "its ZIP64 sizes are missing");
    if (m->method == 0 && m->size != m->stored_bytes) return fail(z, m->name, err, "its two sizes differ");
    return AQ_OK;
}

aq_status aq_zip_open(aq_zip *out, int fd, uint64_t file_size, const char *path, aq_error *err) {
    *out = (aq_zip){.path = path, .fd = fd, .file_size = file_size};
    directory d = {0};
    if (file_size < END_BYTES) return fail(out, NULL, err, "is no ZIP archive: it is too short");
    aq_status status = find_directory(out, &d, err);
    if (status != AQ_OK) return status;
    uint8_t *bytes = aq_alloc(d.size);
    out->members = aq_calloc(d.n + 1, sizeof *out->members);
    if (!bytes || !out->members) status = aq_fail_memory(err, d.size, "the directory of an archive");
    if (status == AQ_OK) status = aq_file_pread(fd, bytes, d.size, d.offset, path, err);
    uint64_t at = 0, used = 0;
    for (uint64_t i = 0; status == AQ_OK && i < d.n; i++, at += used) status = read_entry(out, bytes + at, d.size - at, &used, err);
    aq_free(bytes);
    return status;
}

void aq_zip_close(aq_zip *z) {
    for (size_t i = 0; i < z->n_members; i++) aq_free(z->members[i].name);
    aq_free(z->members);
    memset(z, 0, sizeof *z);
}

/* ---- members ---- */

struct aq_zip_stream {
    const char *path, *member; /* member NULL: a plain file */
    int fd;
    uint64_t at, stored_left; /* in the file */
    uint64_t left;            /* of what comes out */
    bool deflated, check;
    uint32_t crc, expected;
    z_stream z;
    uint8_t chunk[CHUNK];
};

aq_status aq_zip_stream_plain(aq_zip_stream **out, int fd, uint64_t size, const char *path, aq_error *err) {
    aq_zip_stream *s = *out = aq_calloc(1, sizeof *s);
    if (!s) return aq_fail_memory(err, sizeof *s, "reading a file");
    s->path = path;
    s->fd = fd;
    s->left = s->stored_left = size;
    return AQ_OK;
}

aq_status aq_zip_stream_open(aq_zip_stream **out, const aq_zip *zip, const aq_zip_member *m, aq_error *err) {
    uint8_t local[LOCAL_BYTES];
    *out = NULL;
    if (m->offset > zip->file_size || zip->file_size - m->offset < LOCAL_BYTES) return fail(zip, m->name, err, "lies outside the archive");
    aq_status status = aq_file_pread(zip->fd, local, LOCAL_BYTES, m->offset, zip->path, err);
    if (status != AQ_OK) return status;
    uint64_t begin = m->offset + LOCAL_BYTES + get16(local + 26) + get16(local + 28);
    if (get32(local) != 0x04034b50 || begin > zip->file_size || m->stored_bytes > zip->file_size - begin)
        return fail(zip, m->name, err, "lies outside the archive, or its header is damaged");
    if (m->method != 0 && m->method != 8) return fail(zip, m->name, err, "is compressed in a way that is not read; expected stored or deflate");
    status = aq_zip_stream_plain(out, zip->fd, m->size, zip->path, err);
    aq_zip_stream *s = *out;
    if (status != AQ_OK || !s) return status;
    s->member = m->name;
    s->at = begin;
    s->stored_left = m->stored_bytes;
    s->expected = m->crc;
    s->check = true;
    s->crc = (uint32_t)crc32(0, NULL, 0);
    if (m->method == 8) {
        if (inflateInit2(&s->z, -15) != Z_OK) {
            aq_zip_stream_close(s);
            *out = NULL;
            return aq_fail_memory(err, CHUNK, "inflating");
        }
        s->deflated = true;
    }
    return AQ_OK;
}

void aq_zip_stream_close(aq_zip_stream *s) {
    if (!s) return;
    if (s->deflated) inflateEnd(&s->z);
    aq_free(s);
}

uint64_t aq_zip_stream_left(const aq_zip_stream *s) { return s->left; }

/* More compressed bytes. */
static aq_status refill(aq_zip_stream *s, aq_error *err) {
    uint64_t some = s->stored_left < CHUNK ? s->stored_left : CHUNK;
    if (some == 0) return aq_fail_at(err, AQ_ERR_FORMAT, s->path, s->member, "its compressed data end early");
    aq_status status = aq_file_pread(s->fd, s->chunk, some, s->at, s->path, err);
    s->at += some;
    s->stored_left -= some;
    s->z.next_in = s->chunk;
    s->z.avail_in = (uInt)some;
    return status;
}

static aq_status inflate_some(aq_zip_stream *s, uint8_t *out, uint64_t size, aq_error *err) {
    s->z.next_out = out;
    s->z.avail_out = (uInt)size;
    while (s->z.avail_out > 0) {
        if (s->z.avail_in == 0) {
            aq_status status = refill(s, err);
            if (status != AQ_OK) return status;
        }
        int code = inflate(&s->z, Z_NO_FLUSH);
        if (code == Z_MEM_ERROR) return aq_fail_memory(err, CHUNK, "inflating");
        if (code != Z_OK && !(code == Z_STREAM_END && s->z.avail_out == 0))
            return aq_fail_at(err, AQ_ERR_FORMAT, s->path, s->member, "its compressed data are damaged, or end early");
    }
    return AQ_OK;
}

aq_status aq_zip_stream_read(aq_zip_stream *s, void *out, uint64_t size, aq_error *err) {
    uint8_t *to = out;
    if (size > s->left) return aq_fail_at(err, AQ_ERR_FORMAT, s->path, s->member, "ends early");
    while (size > 0) {
        uint64_t some = size < (1u << 30) ? size : 1u << 30;
        aq_status status = s->deflated ? inflate_some(s, to, some, err) : aq_file_pread(s->fd, to, some, s->at, s->path, err);
        if (status != AQ_OK) return status;
        if (!s->deflated) s->at += some;
        if (s->check) s->crc = (uint32_t)crc32(s->crc, to, (uInt)some);
        to += some;
        size -= some;
        s->left -= some;
    }
    if (s->left == 0 && s->check && s->crc != s->expected)
        return aq_fail_at(err, AQ_ERR_FORMAT, s->path, s->member, "is damaged: its bytes do not match their checksum");
    return AQ_OK;
}
