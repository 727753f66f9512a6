//! What QEMU's answers mean.

use super::*;
use serde_json::json;

fn entry(value: Value) -> Option<FoundDisk> {
    serde_json::from_value::<BlockEntry>(value).unwrap().disk()
}

#[test]
fn disks_of_the_block_layer_are_named_as_people_name_them() {
    let disk = entry(
        json!({"device": "dr", "qdev": "/machine/peripheral/os/virtio-backend",
        "inserted": {"ro": false, "file": "os.qcow2", "node-name": "#block1", "future": 1}}),
    )
    .unwrap();
    assert_eq!(disk.device, "os");
    assert_eq!(disk.aliases, ["dr", "#block1"]);
    assert!(!disk.backing.is_read_only());
    let disk = entry(
        json!({"device": "", "qdev": "/machine/peripheral-anon/device[3]",
        "inserted": {"ro": true, "file": "x"}}),
    )
    .unwrap();
    assert_eq!(disk.device, "/machine/peripheral-anon/device[3]");
    assert!(disk.backing.is_read_only());
}

#[test]
fn what_is_no_disk_of_the_guest_is_passed_over() {
    assert_eq!(
        entry(json!({"device": "tray", "qdev": "/machine/peripheral/cd"})),
        None
    );
    assert_eq!(
        entry(json!({"device": "unused", "inserted": {"file": "f"}})),
        None
    );
    let flash = json!({"device": "pflash0", "qdev": "/machine/system.flash0",
        "inserted": {"file": "vars.fd"}});
    assert_eq!(entry(flash), None);
}

#[test]
fn events_that_end_a_hold_are_told_with_their_data() {
    let told = disturbance(&json!({"event": "DEVICE_DELETED", "data": {"device": "disk1"}}));
    assert!(told.unwrap().contains("disk1"));
    assert!(disturbance(&json!({"event": "STOP"})).is_some());
    assert!(disturbance(&json!({"event": "RTC_CHANGE"})).is_none());
    assert!(disturbance(&json!({"QMP": {}})).is_none());
}
