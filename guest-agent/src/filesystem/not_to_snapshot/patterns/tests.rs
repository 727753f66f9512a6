//! What patterns fit, and what lines are none.

use super::*;

#[test]
fn stars_and_question_marks_fit_names() {
    let fit = [
        ("*", ""),
        ("*", "a"),
        ("a*", "a"),
        ("*.tmp", "x.tmp"),
        ("*.tmp", ".tmp"),
        ("a?c", "abc"),
        ("a*b*c", "aXXbYYc"),
        ("*a*a", "aaa"),
        ("ä?", "äö"),
    ];
    for (pattern, name) in fit {
        assert!(matches(pattern, name), "{pattern} {name}");
    }
    let do_not = [
        ("", "a"),
        ("a", ""),
        ("?", ""),
        ("*.tmp", "x.tmp2"),
        ("a?c", "ac"),
        ("a*b*c", "aXXcYYb"),
        ("[a]", "a"),
    ];
    for (pattern, name) in do_not {
        assert!(!matches(pattern, name), "{pattern} {name}");
    }
}

#[test]
fn lines_name_files_by_absolute_paths() {
    assert_eq!(parse("/a/b*.log"), Some(FileSet::new("/a", "b*.log")));
    assert_eq!(parse("/swapfile"), Some(FileSet::new("/", "swapfile")));
    assert_eq!(parse("/var/cache/**"), Some(FileSet::tree("/var/cache")));
    for line in ["a", "a/b", "/a/../b/c", "/a/", "/a/*/b", "../**", "/a/.."] {
        assert_eq!(parse(line), None, "{line}");
    }
}

#[test]
fn all_conf_files_are_read_in_order_and_what_is_wrong_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text);
    write("20-b.conf", "/b/*\nnonsense\n").unwrap();
    write("10-a.conf", "# caches\n\n  /a/**\n").unwrap();
    write("ignored.txt", "/c/*\n").unwrap();
    let (sets, wrong) = read_directory(directory.path());
    assert_eq!(sets, [FileSet::tree("/a"), FileSet::new("/b", "*")]);
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert_eq!(read_directory(Path::new("/nowhere")).0, []);
}
