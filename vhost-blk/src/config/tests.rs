//! What flags and files become, and what is refused.

use super::{Cli, Command, Config, resolve};
use clap::Parser;
use std::path::Path;
use vhost_blk_wire::types::Method;

fn configure(flags: &[&str]) -> Result<Config, String> {
    let flags = ["vhost-blk", "serve"].iter().chain(flags);
    let cli = Cli::try_parse_from(flags).map_err(|error| error.to_string())?;
    let Command::Serve(args) = cli.command;
    resolve(&args).map_err(|error| error.to_string())
}

#[test]
fn one_disk_needs_a_file_and_a_socket_only() {
    let config = configure(&["--disk", "/d/disk.raw", "--socket", "/s/vda"]).unwrap();
    let disk = &config.disks[0];
    assert_eq!(disk.name, "disk");
    assert_eq!(disk.serial, "disk");
    assert_eq!(disk.shadow_storage, Path::new("/d/disk.raw.shadow"));
    assert_eq!(disk.method, Method::Row);
    assert!(config.direct);
    assert_eq!(config.control, None);
    assert_eq!(config.poll_max.as_micros(), 32);
}

#[test]
fn looking_for_work_can_be_allowed_up_to_a_limit() {
    let with = |us| {
        let flags = ["--disk", "/d/a", "--socket", "/s/a", "--poll-max-us", us];
        configure(&flags).map(|config| config.poll_max.as_micros())
    };
    assert_eq!(with("0"), Ok(0));
    assert_eq!(with("200"), Ok(200));
    assert!(with("100001").is_err());
    assert!(with("-1").is_err());
}

#[test]
fn memory_for_the_index_has_bounds() {
    let with = |bytes| {
        let flags = [
            "--disk",
            "/d/a",
            "--socket",
            "/s/a",
            "--index-memory",
            bytes,
        ];
        configure(&flags).map(|config| config.index_memory_bytes)
    };
    assert_eq!(with("1048576"), Ok(1 << 20));
    assert_eq!(with("8388608"), Ok(8 << 20));
    assert!(with("1048575").is_err());
    assert!(with("17179869185").is_err());
}

#[test]
fn several_disks_are_groups_with_flags_as_defaults() {
    let config = configure(&[
        "--method",
        "cow",
        "--disk",
        "path=/d/a,,b.raw,socket=/s/a,serial=A",
        "--disk",
        "path=/d/c.raw,socket=/s/c,name=data,method=row,num-queues=2,read-only=on,shadow-storage=/v",
    ])
    .unwrap();
    assert_eq!(config.disks[0].path, Path::new("/d/a,b.raw"));
    assert_eq!(config.disks[0].name, "A");
    assert_eq!(config.disks[0].method, Method::Cow);
    assert_eq!(config.disks[1].name, "data");
    assert_eq!(config.disks[1].method, Method::Row);
    assert_eq!(config.disks[1].num_queues, 2);
    assert!(config.disks[1].read_only);
    assert_eq!(config.disks[1].shadow_storage, Path::new("/v"));
}

#[test]
fn a_file_says_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vhost-blk.toml");
    std::fs::write(
        &file,
        r#"
            control = "/s/control"
            engine = "sync"
            direct = false
            [[disk]]
            path = "/d/a.raw"
            socket = "/s/a"
            serial = "A"
            method = "cow"
        "#,
    )
    .unwrap();
    let config = configure(&["--config", file.to_str().unwrap()]).unwrap();
    assert_eq!(config.disks[0].serial, "A");
    assert_eq!(config.disks[0].method, Method::Cow);
    assert!(!config.direct);
    assert_eq!(config.control.as_deref(), Some(Path::new("/s/control")));
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    for (flags, expected) in [
        (vec![], "no disk"),
        (vec!["--disk", "/d/a.raw"], "no socket"),
        (
            vec!["--disk", "path=/a,socket=/s", "--serial", "A"],
            "--serial is for a single",
        ),
        (
            vec!["--disk", "path=/a,socket=/s,colour=red"],
            "unknown key \"colour\"",
        ),
        (
            vec!["--disk", "path=/a,socket=/s,method=full"],
            "row or cow",
        ),
        (vec!["--disk", "path=/a,socket=/s,num-queues=0"], "1 to 32"),
        (
            vec![
                "--disk",
                "path=/x/a,socket=/s",
                "--disk",
                "path=/y/a,socket=/t",
            ],
            "name \"a\" is given twice",
        ),
        (
            vec!["--disk", "path=/a,socket=/s", "--disk", "path=/b,socket=/s"],
            "socket \"/s\" is given twice",
        ),
        (
            vec![
                "--disk",
                "/a",
                "--socket",
                "/s",
                "--serial",
                "123456789012345678901",
            ],
            "at most 20",
        ),
        (vec!["--config", "/nonexistent/file"], "cannot be read"),
    ] {
        let error = configure(&flags).unwrap_err();
        assert!(error.contains(expected), "{flags:?}: {error}");
    }
}
