//! The host's side of the rig.
//!
//! Called by scenarios, the demo and the measuring commands. A scenario reads like this: build the
//! image (`image`), make disks (`disk`), serve them (`daemon`), boot a machine (`vm`), talk to it
//! (`guest`), put it under load (`load`), take a set (`bridge`), judge the copy (`oracle`). Nothing
//! here sleeps for a fixed time: `wait` polls a condition until its deadline. Every process is
//! killed when its owner is dropped, and when the test program dies (`process`).

pub mod bridge;
pub mod daemon;
pub mod database;
pub mod disk;
pub mod figures;
pub mod guest;
pub mod image;
pub mod libvirt;
pub mod load;
pub mod oracle;
pub mod process;
pub mod proof;
pub mod qga;
pub mod qmp;
pub mod requires;
pub mod site;
pub mod vm;
pub mod vsock;
pub mod wait;
