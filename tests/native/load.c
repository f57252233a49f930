/*
 * load.c - each block that is written carries one tag all over; a block that is read and carries two is torn.
 */
#include <sched.h>

#include "load.h"

struct slot {
	struct request request;
	bool write;
};

static void fill(uint8_t *block, uint64_t tag)
{
	for (unsigned i = 0; i < 512; i += 8)
		memcpy(block + i, &tag, 8);
}

static bool torn(const uint8_t *block)
{
	for (unsigned i = 8; i < 512; i += 8)
		if (memcmp(block, block + i, 8))
			return true;
	return false;
}

static void send(struct load *load, struct slot *slot, uint64_t *random, uint64_t *generation)
{
	uint8_t *cdb = request_header(load->ring, &slot->request) + 19;
	uint32_t lba;

	*random = *random * 6364136223846793005ull + 1442695040888963407ull;
	lba = (uint32_t)((*random >> 33) % (load->span / load->blocks)) * load->blocks;
	for (unsigned i = 0; i < 4; i++)
		cdb[2 + i] = (uint8_t)(lba >> (24 - 8 * i));
	for (uint32_t i = 0; slot->write && i < load->blocks; i++)
		fill(request_out(load->ring, &slot->request) + 512 * i, (uint64_t)load->writer << 48 | ++*generation);
	drive_offer(load->ring, slot->request.head);
}

static void look(struct load *load, const struct slot *slot)
{
	uint8_t response = request_response(load->ring, &slot->request);
	uint8_t status = request_status(load->ring, &slot->request);

	if (response == S_OK && !status) {
		for (uint32_t i = 0; !slot->write && i < load->blocks; i++)
			if (torn(request_in(load->ring, &slot->request) + 512 * i))
				atomic_fetch_add(&load->torn, 1);
		atomic_fetch_add(&load->good, 1);
	} else if (response == S_RESET) {
		atomic_fetch_add(&load->reset, 1);
	} else if (response == S_OK && status == 0x28) {
		atomic_fetch_add(&load->full, 1);
	} else {
		atomic_fetch_add(&load->other, 1);
	}
}

static void *drive(void *argument)
{
	struct load *load = argument;
	struct slot *slots = calloc(load->depth, sizeof(*slots));
	uint64_t random = load->writer * 7919u, generation = 0;
	unsigned in_flight = 0;

	for (unsigned i = 0; i < load->depth; i++) {
		slots[i].write = i * 100 < load->depth * load->write_percent;
		slots[i].request = request_rw(load->ring, i, slots[i].write ? OP_WRITE_10 : OP_READ_10, 0, load->blocks);
		send(load, &slots[i], &random, &generation);
		in_flight++;
	}
	drive_kick(load->ring);
	while (in_flight) {
		struct used used = drive_wait(load->ring);
		struct slot *slot = &slots[used.head / 4];

		look(load, slot);
		if (atomic_load(&load->stop)) {
			in_flight--;
			continue;
		}
		send(load, slot, &random, &generation);
		drive_kick(load->ring);
	}
	free(slots);
	atomic_store(&load->done, true);
	return NULL;
}

void load_start(struct load *load)
{
	atomic_store(&load->stop, false);
	atomic_store(&load->done, false);
	CHECK_EQUAL(pthread_create(&load->thread, NULL, drive, load), 0);
}

void load_stop(struct load *load)
{
	atomic_store(&load->stop, true);
	pthread_join(load->thread, NULL);
}

void load_await(struct load *load, uint64_t good)
{
	uint64_t from = atomic_load(&load->good);

	while (atomic_load(&load->good) < from + good)
		sched_yield();
}
