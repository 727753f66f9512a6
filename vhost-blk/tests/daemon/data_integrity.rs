//! What a guest writes is what it reads and what is in the file, with both engines.

use crate::harness::{Daemon, Disk, Scratch};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::os::unix::fs::FileExt;

const SIZE: u64 = 64 << 20;

fn with_engine(engine: &str, extra: &[&str], test: impl Fn(&mut Disk, &Scratch)) {
    let scratch = Scratch::new();
    let disk = scratch.disk("disk.raw", SIZE);
    let socket = scratch.path("socket");
    let mut arguments = vec![
        "--disk",
        disk.to_str().unwrap(),
        "--socket",
        socket.to_str().unwrap(),
        "--engine",
        engine,
    ];
    arguments.extend(extra);
    let daemon = Daemon::start(&arguments);
    let mut client = if extra.contains(&"--read-only") {
        Disk::attach_read_only(&socket)
    } else {
        Disk::attach(&socket, 4)
    };
    test(&mut client, &scratch);
    drop(client);
    assert!(daemon.terminate().success());
}

fn random_requests_agree_with_a_model(engine: &str, extra: &[&str]) {
    with_engine(engine, extra, |disk, scratch| {
        assert_eq!(disk.capacity(), SIZE);
        let mut random = SmallRng::seed_from_u64(1);
        let mut model = vec![0_u8; usize::try_from(SIZE).unwrap()];
        for step in 0..600 {
            let queue = &mut disk.queues[step % 4];
            let sectors = random.random_range(1..=256_u64);
            let offset = random.random_range(0..SIZE / 512 - sectors) * 512;
            let length = usize::try_from(sectors * 512).unwrap();
            let start = usize::try_from(offset).unwrap();
            let part = start..start + length;
            match random.random_range(0..10) {
                0..5 => {
                    random.fill(&mut model[part.clone()]);
                    queue.write(offset, &model[part]).unwrap();
                }
                5..8 => assert!(
                    queue.read(offset, length).unwrap() == model[part],
                    "step {step}"
                ),
                8 => {
                    queue.write_zeroes(offset, sectors * 512).unwrap();
                    model[part].fill(0);
                }
                _ => queue.flush().unwrap(),
            }
        }
        disk.first().flush().unwrap();
        let file = std::fs::File::open(scratch.path("disk.raw")).unwrap();
        let mut content = vec![0; model.len()];
        file.read_exact_at(&mut content, 0).unwrap();
        assert!(
            content == model,
            "the file is the disk as long as there is no snapshot"
        );
    });
}

#[test]
fn random_requests_agree_with_a_model_through_io_uring() {
    random_requests_agree_with_a_model("uring", &[]);
}

#[test]
fn random_requests_agree_with_a_model_through_plain_system_calls() {
    random_requests_agree_with_a_model("sync", &[]);
}

#[test]
fn random_requests_agree_with_a_model_through_the_page_cache() {
    random_requests_agree_with_a_model("auto", &["--no-direct"]);
}

#[test]
fn many_requests_in_flight_on_many_queues_end_once_each() {
    for engine in ["uring", "sync"] {
        with_engine(engine, &[], |disk, _| {
            for (index, queue) in disk.queues.iter_mut().enumerate() {
                let base = index as u64 * (SIZE / 4);
                for request in 0..64_usize {
                    let place = request * 65536;
                    queue.memory.fill(place, &vec![request as u8 + 1; 65536]);
                    queue.start_write(base + place as u64, place, 65536, request);
                }
            }
            for queue in &mut disk.queues {
                let mut ids: Vec<_> = queue
                    .complete(64)
                    .into_iter()
                    .map(|(id, result)| {
                        assert_eq!(result, 0);
                        id
                    })
                    .collect();
                ids.sort_unstable();
                assert_eq!(ids, (0..64).collect::<Vec<_>>());
            }
            for (index, queue) in disk.queues.iter_mut().enumerate() {
                for request in [0_usize, 31, 63] {
                    let offset = index as u64 * (SIZE / 4) + request as u64 * 65536;
                    let read = queue.read(offset, 65536).unwrap();
                    assert!(read.iter().all(|byte| *byte == request as u8 + 1));
                }
            }
        });
    }
}

#[test]
fn memory_that_is_not_aligned_goes_through_a_copy() {
    for engine in ["uring", "sync"] {
        with_engine(engine, &[], |disk, _| {
            let queue = disk.first();
            let bytes: Vec<u8> = (0..8192_u32).map(|byte| (byte % 251) as u8).collect();
            queue.memory.fill(77, &bytes);
            queue.start_write(4096, 77, 8192, 1);
            assert_eq!(queue.complete(1), [(1, 0)]);
            queue.start_read(4096, 100_001, 8192, 2);
            assert_eq!(queue.complete(1), [(2, 0)]);
            assert!(queue.memory.take(100_001, 8192) == bytes);
        });
    }
}

#[test]
fn discarded_blocks_may_be_gone_and_their_neighbours_stay() {
    for engine in ["uring", "sync"] {
        with_engine(engine, &[], |disk, scratch| {
            let queue = disk.first();
            queue.write(0, &vec![7; 1 << 20]).unwrap();
            queue.discard(65536, 131_072).unwrap();
            assert_eq!(queue.read(61440, 4096).unwrap(), vec![7; 4096]);
            assert_eq!(queue.read(65536 + 131_072, 4096).unwrap(), vec![7; 4096]);
            queue.flush().unwrap();
            use std::os::unix::fs::MetadataExt;
            let blocks = std::fs::metadata(scratch.path("disk.raw"))
                .unwrap()
                .blocks()
                * 512;
            assert!(
                blocks <= (1 << 20) - 131_072,
                "{blocks} bytes are allocated"
            );
        });
    }
}

#[test]
fn requests_beyond_the_end_are_errors_and_the_disk_goes_on() {
    with_engine("auto", &[], |disk, _| {
        let queue = disk.first();
        for (offset, length) in [
            (SIZE, 512),
            (SIZE - 512, 1024),
            (u64::MAX / 512 * 512 - 512, 512),
        ] {
            queue.start_read(offset, 0, length, 1);
            assert!(queue.complete(1)[0].1 < 0, "read of {length} at {offset}");
            queue.start_write(offset, 0, length, 1);
            assert!(queue.complete(1)[0].1 < 0, "write of {length} at {offset}");
        }
        queue.write(SIZE - 512, &[9; 512]).unwrap();
        assert_eq!(queue.read(SIZE - 512, 512).unwrap(), [9; 512]);
    });
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    with_engine("auto", &["--read-only"], |disk, scratch| {
        let queue = disk.first();
        assert_eq!(queue.read(0, 512).unwrap(), [0; 512]);
        let before = std::fs::read(scratch.path("disk.raw")).unwrap();
        queue.memory.fill(0, &[1; 512]);
        queue.start_write(0, 0, 512, 1);
        assert!(queue.complete(1)[0].1 < 0);
        assert!(std::fs::read(scratch.path("disk.raw")).unwrap() == before);
    });
}
