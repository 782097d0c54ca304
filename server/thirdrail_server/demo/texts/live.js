import { connect } from "./socket.js";

const table = document.querySelector("#parts");
const alarms = new Map();

async function refresh(serial) {
  const response = await fetch(`/api/parts/${serial}`);
  if (!response.ok) {
    throw new Error(`cannot read ${serial}: ${response.status}`);
  }
  const { temperature, load } = await response.json();
  alarms.set(serial, temperature > 70 || load > 95);
  table.dispatchEvent(new CustomEvent("refreshed", { detail: serial }));
}

connect((event) => refresh(event.serial).catch(console.error));

export default refresh;
